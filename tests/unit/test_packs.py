"""Packs by hand: what fits exactly into a budget, and in which order."""

from __future__ import annotations

import numpy as np
import pytest
from trees import make_tree

from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.pack.budget import Pack, pack_rows
from deepgrpo.pack.layout import Layout, Row, lay_out
from deepgrpo.pack.packs import pack_layout
from deepgrpo.pack.tree import pack_trees
from deepgrpo.records import Credit, Tree


def row(length: int, term: int) -> Row:
    return Row(np.arange(length), np.array([length - 2]), np.array([term]))


def layout(*trees: Tree) -> Layout:
    return lay_out(trees, [sibling_credit(tree) for tree in trees])


def terms(packs: list[Pack]) -> list[list[int]]:
    return [pack.terms_n.tolist() for pack in packs]


def sequences(packs: list[Pack], of: Layout) -> list[list[int]]:
    """Nodes with terms in each pack, by their sequence numbers."""
    return [sorted(set(of.terms.sequence_N[pack.terms_n].tolist())) for pack in packs]


def test_rows_fill_a_budget_to_the_last_token() -> None:
    """Two rows of 5 are 10 tokens."""
    assert terms(pack_rows([row(5, 0), row(5, 1)], 10)) == [[0, 1]]
    assert terms(pack_rows([row(5, 0), row(5, 1)], 9)) == [[0], [1]]


def test_rows_are_sorted_by_length_and_padding_counts() -> None:
    """Lengths 2, 3, 4, 9, 9, budget 18: three rows of at most 4 are 12; a fourth of 9 would make 36; then 2 · 9 = 18."""
    packs = pack_rows([row(9, 0), row(2, 1), row(4, 2), row(9, 3), row(3, 4)], 18)
    assert terms(packs) == [[1, 4, 2], [0, 3]]
    assert [pack.input_ids_BT.shape for pack in packs] == [(3, 4), (2, 9)] and [pack.num_tokens for pack in packs] == [9, 18]


def test_a_row_beyond_the_budget_is_alone() -> None:
    assert terms(pack_rows([row(7, 0), row(2, 1), row(2, 2)], 4)) == [[1, 2], [0]]


def test_trees_fill_a_budget_to_the_last_token() -> None:
    """A prompt of 3 with rollouts of 4 and 5 is 12 tokens; under 11 the prompt repeats: 3 + 5 and 3 + 4."""
    tree = make_tree([(4, 0.0), (5, 1.0)])
    found = layout(tree)
    assert [pack.num_tokens for pack in pack_trees([tree], found, 12)] == [12]
    assert [pack.num_tokens for pack in pack_trees([tree], found, 11)] == [8, 7]
    # two trees of 12 share a pack of 24
    both = layout(tree, tree)
    assert [pack.num_tokens for pack in pack_trees([tree, tree], both, 24)] == [24]
    assert [pack.num_tokens for pack in pack_trees([tree, tree], both, 23)] == [12, 12]


def test_the_largest_rollouts_come_first() -> None:
    """Rollouts of 2, 4, 4 and 6 behind a prompt of 2, under 10: 6 + 2 and 4 + 4 make two packs; from the smallest on it
    would be three, 2 + 4, 4 and 6."""
    tree = make_tree([(2, 0.0), (4, 1.0), (4, 0.0), (6, 1.0)], prompt_length=2)
    found = layout(tree)
    packs = pack_trees([tree], found, 10)
    assert sequences(packs, found) == [[0, 3], [1, 2]] and [pack.num_tokens for pack in packs] == [10, 10]


def test_a_rollout_is_split_where_its_prompt_leaves_no_room() -> None:
    """Rollout 0 of 6 tokens with branches of 3 and 3 after its fourth: 12 tokens and a prompt of 3.

    Under 15 all are in one pack. Under 14 the second branch repeats its prefix: 3 + 6 + 3, and 3 + 4 + 3.
    """
    tree = make_tree([(6, 0.0), (1, 1.0)], [(0, 4, [(3, 1.0), (3, 0.0)])])
    found = lay_out([tree], [_without(tree, 1)])
    assert [pack.num_tokens for pack in pack_trees([tree], found, 15)] == [15]
    packs = pack_trees([tree], found, 14)
    assert [pack.num_tokens for pack in packs] == [12, 10] and sequences(packs, found) == [[0, 1], [2]]


def _without(tree: Tree, node: int) -> Credit:
    credit = sibling_credit(tree)
    return Credit(tuple(span for span in credit.spans if span.node != node), credit.groups)


def test_a_branch_is_predicted_from_its_pivot() -> None:
    """Prompt at 0 to 2, rollout 0 at 3 to 8: its terms come from 2 to 7. The branch after its fourth token (6) is at 9 and 10:
    its terms come from 6 and 9. Rollout 1 is at 11: its term comes from 2."""
    tree = make_tree([(6, 0.0), (1, 1.0)], [(0, 4, [(2, 1.0), (1, 0.0)])])
    found = layout(tree)
    (pack,) = pack_trees([tree], found, 100)
    by_node = {n: pack.rows_n[found.terms.sequence_N[pack.terms_n] == n].tolist() for n in range(4)}
    assert by_node == {0: [2, 3, 4, 5, 6, 7], 2: [6, 9], 3: [6], 1: [2]}
    assert pack.positions_BT is not None and pack.positions_BT[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 7, 3]


@pytest.mark.parametrize(("window", "packed"), [(None, True), (9, True), (8, False)])
def test_a_path_as_long_as_the_window_is_packed(window: int | None, packed: bool) -> None:
    """The longest path has a prompt of 3 and 6 tokens."""
    tree = make_tree([(6, 0.0), (5, 1.0)])
    packs = pack_layout([tree], layout(tree), 100, tree_packs=True, window=window)
    assert [bool(pack.segments) for pack in packs] == [packed]
    assert not any(pack.segments for pack in pack_layout([tree], layout(tree), 100, tree_packs=False))
