"""TreeRL: which tokens are written anew, and what each piece of the tree is worth."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from trees import make_tree

from deepgrpo.config import TreeRLExplore
from deepgrpo.credit.tree_values import tree_parts, treerl_credit
from deepgrpo.engines.base import SamplingParams
from deepgrpo.errors import ConfigError
from deepgrpo.explore.base import Context, Limits
from deepgrpo.explore.grow import grow
from deepgrpo.explore.toy import FakeEngine, Letters, decode, make_judge, make_prompt
from deepgrpo.explore.treerl import TreeRLStrategy, draw_leaves
from deepgrpo.records import ROOT, Credit, Tree

LIMITS = Limits(max_new_tokens=100, max_total_tokens=200)
RANDOM = np.random.default_rng(0)


def _strategy(texts: Mapping[int, str] | None = None, **changes: Any) -> TreeRLStrategy:
    config = TreeRLExplore.model_validate({"num_rollouts": 2, **changes})
    return TreeRLStrategy(config, lambda token: (texts or {}).get(token, "x"))


def _surprised(tree: Tree, surprisals: Mapping[int, Sequence[float]]) -> Tree:
    """Nodes with these surprisals of their tokens."""
    nodes = [
        replace(node, logprobs=tuple(-s for s in surprisals[i])) if i in surprisals else node
        for i, node in enumerate(tree.nodes)
    ]
    assert all(len(node.logprobs) == len(node.tokens) for node in nodes)
    return replace(tree, nodes=tuple(nodes))


def _places(strategy: TreeRLStrategy, tree: Tree, limits: Limits = LIMITS) -> list[tuple[int, int]]:
    return [(p.parent, p.offset) for p in strategy.plan(tree, {}, limits, RANDOM)]


# ---------------------------------------------------------------- where it branches


def test_the_most_surprising_tokens_of_each_rollout_are_written_anew() -> None:
    """Of equals the first; the pivot lies before the token. Ratio as if each token were a segment: (offset + 1) / 5 and / 4."""
    tree = _surprised(make_tree([(4, 0.0), (3, 1.0)]), {0: [0.1, 3.0, 0.2, 2.0], 1: [5.0, 0.1, 0.1]})
    strategy = _strategy()
    pivots = strategy.plan(tree, {}, LIMITS, RANDOM)
    assert [(p.parent, p.offset) for p in pivots] == [(0, 1), (0, 3), (1, 0), (1, 1)]
    assert [p.ratio for p in pivots] == pytest.approx([2 / 5, 4 / 5, 1 / 4, 2 / 4])
    assert {(p.num_branches, p.stream) for p in pivots} == {(2, "branch")}
    assert _places(_strategy(num_pivots=9), tree) == [(0, 1), (0, 3), (0, 2), (0, 0), (1, 0), (1, 1), (1, 2)]


def test_the_second_round_looks_at_whole_trees_but_not_at_states_that_have_branches() -> None:
    """Round 1 took (0, 1) and (1, 1). The first token of a branch stands at its pivot, however surprising it was."""
    tree = make_tree([(3, 0.0), (3, 1.0)], [(0, 1, [(2, 0.0), (2, 1.0)]), (1, 1, [(1, 0.0), (1, 1.0)])])
    tree = _surprised(
        tree, {0: [0.1, 3.0, 0.2], 1: [0.1, 0.3, 0.1], 2: [9.0, 0.1], 3: [0.1, 4.0], 4: [8.0], 5: [8.0]}
    )
    strategy = _strategy(num_pivots=1, num_rounds=2)
    pivots = strategy.plan(tree, {}, LIMITS, RANDOM)
    assert [(p.parent, p.offset) for p in pivots] == [(3, 1), (1, 0)]
    # one token of node 0, one of node 3, and the next of a path of three
    assert pivots[0].ratio == pytest.approx(3 / 4)
    assert strategy.returns(0) and strategy.returns(1) and not strategy.returns(2)
    assert _places(_strategy(num_pivots=1, num_rounds=1), tree) == []
    assert not _strategy(num_rounds=1).returns(1)


def test_rounds_are_counted_where_the_first_had_fewer_tokens_than_it_wanted() -> None:
    """Two tokens each and N = 3: round 1 takes all four; round 2 finds only what the branches brought: a second token."""
    tree = make_tree(
        [(2, 0.0), (2, 1.0)],
        [(0, 0, [(1, 0.0)]), (0, 1, [(2, 0.0)]), (1, 0, [(1, 1.0)]), (1, 1, [(1, 0.0)])],
    )
    settings = {"num_pivots": 3, "branches_per_pivot": 1}
    assert _places(_strategy(num_rounds=2, **settings), tree) == [(3, 1)]
    grown = tree.add(_strategy(num_rounds=2, **settings).plan(tree, {}, LIMITS, RANDOM), [])
    assert _places(_strategy(num_rounds=2, **settings), grown) == []


def test_never_behind_the_answer() -> None:
    """Tokens 7 to 10 are node 0: "The", " ANSWER", " is", "4". The word itself may be written anew."""
    texts = {7: "The", 8: " ANSWER", 9: " is", 10: "4"}
    tree = _surprised(make_tree([(4, 0.0), (2, 1.0)]), {0: [0.1, 0.2, 5.0, 6.0]})
    assert _places(_strategy(texts), tree)[:2] == [(0, 1), (0, 0)]
    assert _places(_strategy(texts, mask_after=[]), tree)[:2] == [(0, 3), (0, 2)]
    assert _places(_strategy(texts, mask_after=["the"]), tree)[0] == (0, 0)


def test_never_at_the_ends_of_a_response_nor_beyond_its_room() -> None:
    """Shares and ends are those of the response: a branch of 8 tokens behind 3 of its rollout is part of eleven.

    Ten tokens: places 3 to 7. Eleven: from 3.3 to before 9, so places 4 to 8, which are own tokens 1 to 5 of the branch.
    """
    tree = make_tree([(10, 0.0), (1, 1.0)], [(0, 3, [(8, 0.0)])])
    tree = _surprised(tree, {0: [0, 0, 0, 1, 0, 0, 0, 0, 0, 0], 2: [9, 2, 0, 0, 0, 3, 9, 9]})
    first = replace(tree, nodes=tree.nodes[:2], pivots=tree.pivots[:1])
    ends = {"skip_first": 0.3, "skip_last": 2, "branches_per_pivot": 1}
    # the rollout of one token has no such place
    assert sorted(_places(_strategy(num_pivots=99, **ends), first)) == [(0, offset) for offset in range(3, 8)]
    assert _places(_strategy(num_pivots=1, **ends), first) == [(0, 3)]
    assert _places(_strategy(num_pivots=1, num_rounds=2, **ends), tree) == [(2, 5)]
    assert sorted(_places(_strategy(num_pivots=99), first, Limits(5, 200))) == [*((0, i) for i in range(5)), (1, 0)]


def test_the_published_setting_grows_thirty_responses() -> None:
    strategy = TreeRLStrategy.build(TreeRLExplore(), Context(tokenizer=Letters()))
    growth = grow(
        [make_prompt("a"), make_prompt("b")], strategy, {}, FakeEngine("endless"), make_judge(), decode=decode,
        params=SamplingParams(), limits=Limits(12, 40), seed=0, step=1,
    )  # fmt: skip
    for tree in growth.trees:
        assert len(tree.nodes) == 6 + 6 * 2 * 1 * 2 == 30
        assert len(tree.pivots) == 1 + 12
    config = TreeRLExplore(num_rollouts=6, num_pivots=2, num_rounds=1, branches_per_pivot=2)
    assert config == TreeRLExplore()
    assert config.num_rollouts * (1 + config.most_branches) == 30


# ---------------------------------------------------------------- parts


@pytest.fixture
def three_levels() -> Tree:
    """Rewards of nodes 0 to 5: 0, 1, 1, 0, 1, 0.

        prompt ──┬── node 0  [. . | . . . .]
                 │                ├── node 2  [. | . . .]
                 │                │              ├── node 4  [. .]
                 │                │              └── node 5  [. .]
                 │                └── node 3  [. . .]
                 └── node 1  [. . . .]
    """
    return make_tree([(6, 0.0), (4, 1.0)], [(0, 2, [(4, 1.0), (3, 0.0)]), (2, 1, [(2, 1.0), (2, 0.0)])])


def test_parts_lie_between_branches(three_levels: Tree) -> None:
    parts = tree_parts(three_levels)
    assert [(p.node, p.start, p.end, p.parent, p.leaves) for p in parts] == [
        (0, 0, 2, ROOT, (0, 2, 3, 4, 5)),
        (0, 2, 6, 0, (0,)),
        (1, 0, 4, ROOT, (1,)),
        (2, 0, 1, 0, (2, 4, 5)),
        (2, 1, 4, 3, (2,)),
        (3, 0, 3, 0, (3,)),
        (4, 0, 2, 3, (4,)),
        (5, 0, 2, 3, (5,)),
    ]


def test_what_branches_off_before_a_first_token_hangs_where_its_node_hangs() -> None:
    tree = make_tree([(3, 0.0), (3, 1.0)], [(0, 0, [(2, 1.0)]), (0, 1, [(2, 0.0)]), (3, 0, [(2, 1.0)])])
    parts = tree_parts(tree)
    assert [(p.node, p.start, p.end, p.parent) for p in parts] == [
        (0, 0, 1, ROOT), (0, 1, 3, 0), (1, 0, 3, ROOT), (2, 0, 2, ROOT), (3, 0, 2, 0), (4, 0, 2, 0),
    ]  # fmt: skip
    assert parts[0].leaves == (0, 3, 4)


# ---------------------------------------------------------------- advantages by hand


def _advantages(credit: Credit) -> list[float]:
    return [span.advantage for span in credit.spans]


def test_three_levels_by_hand(three_levels: Tree) -> None:
    """V(root) = 3/6. Part, V, number of responses below, [(V - V(root)) + (V - V(parent))] / sqrt(number):

    node 0 [0, 2)   2/5   5   (-1/10 - 1/10) / √5 = -0.0894427
    node 0 [2, 6)   0     1   -1/2 - 2/5          = -9/10
    node 1          1     1    1/2 + 1/2          =  1
    node 2 [0, 1)   2/3   3   (1/6 + 4/15) / √3   =  0.2501851
    node 2 [1, 4)   1     1    1/2 + 1/3          =  5/6
    node 3          0     1   -1/2 - 2/5          = -9/10
    node 4          1     1    1/2 + 1/3          =  5/6
    node 5          0     1   -1/2 - 2/3          = -7/6
    """
    credit = treerl_credit(three_levels)
    assert [(s.node, s.start, s.end) for s in credit.spans] == [
        (0, 0, 2), (0, 2, 6), (1, 0, 4), (2, 0, 1), (2, 1, 4), (3, 0, 3), (4, 0, 2), (5, 0, 2),
    ]  # fmt: skip
    assert _advantages(credit) == pytest.approx([-0.0894427, -0.9, 1.0, 0.2501851, 5 / 6, -0.9, 5 / 6, -7 / 6], abs=1e-7)
    assert {span.stream for span in credit.spans} == {"main"}
    (group,) = credit.groups
    assert (group.stream, group.rewards) == ("main", (0.0, 1.0, 1.0, 0.0, 1.0, 0.0))


def test_the_worked_example_of_the_records(worked_tree: Tree) -> None:
    """V(root) = 1/2, the shared part 1/3 of three responses: (-1/6 - 1/6) / √3."""
    assert _advantages(treerl_credit(worked_tree)) == pytest.approx([-0.1924501, -5 / 6, 1.0, 7 / 6, -5 / 6], abs=1e-7)


def test_against_all_others_is_against_the_mean_but_for_a_factor(three_levels: Tree) -> None:
    """Of six: r minus the mean of five is 6/5 of r minus the mean of six, and so are all differences."""
    plain, others = treerl_credit(three_levels), treerl_credit(three_levels, leaf_values="leave_one_out")
    assert _advantages(others) == pytest.approx([1.2 * a for a in _advantages(plain)])


def test_a_shift_of_all_values_changes_no_difference_of_means(three_levels: Tree) -> None:
    plain, shifted = treerl_credit(three_levels), treerl_credit(three_levels, token_mean="remove")
    assert _advantages(shifted) == pytest.approx(_advantages(plain))


def test_sums_over_roots_by_hand(three_levels: Tree) -> None:
    """Responses of 6, 4, 6, 5, 5, 5 tokens: 31; rewards weighed by them 4 + 6 + 5 = 15. Values 16/31 and -15/31.

    31 · S:  root 3·16 - 3·15 = 3 over √6;  node 0 [0, 2)  2·16 - 3·15 = -13 over √5;  node 2 [0, 1)  32 - 15 = 17 over √3.
    """
    credit = treerl_credit(three_levels, token_mean="remove", node_values="sum")
    root, trunk, branch = 3 / 6**0.5, -13 / 5**0.5, 17 / 3**0.5
    expected = [
        2 * (trunk - root), (-15 - root) + (-15 - trunk), 2 * (16 - root), (branch - root) + (branch - trunk),
        (16 - root) + (16 - branch), (-15 - root) + (-15 - trunk), (16 - root) + (16 - branch), (-15 - root) + (-15 - branch),
    ]  # fmt: skip
    assert _advantages(credit) == pytest.approx([a / 31 for a in expected])
    assert _advantages(credit)[2] == pytest.approx(0.9532423, abs=1e-6)


def test_where_nothing_changes_the_change_before_is_copied() -> None:
    """All three responses below node 0 succeed, node 1 fails: V(root) = 3/4, V = 1 before and behind the branch.

    First part 2 · 1/4 / √3; the others 1/4 + 0, or 1/4 + 1/4 with the copy. Node 1: -3/4 - 3/4.
    """
    tree = make_tree([(4, 1.0), (4, 0.0)], [(0, 2, [(2, 1.0), (2, 1.0)])])
    first = 0.5 / 3**0.5
    assert _advantages(treerl_credit(tree)) == pytest.approx([first, 0.25, -1.5, 0.25, 0.25])
    assert _advantages(treerl_credit(tree, zero_local="copy")) == pytest.approx([first, 0.5, -1.5, 0.5, 0.5])


def test_only_paths_to_kept_responses_are_trained(three_levels: Tree) -> None:
    """Kept 0 and 5: two of them below the trunk, one below node 2. V counts all responses."""
    credit = treerl_credit(three_levels, kept=[0, 5])
    assert [(s.node, s.start, s.end) for s in credit.spans] == [(0, 0, 2), (0, 2, 6), (2, 0, 1), (5, 0, 2)]
    assert _advantages(credit) == pytest.approx([-0.2 / 2**0.5, -0.9, 13 / 30, -7 / 6])
    assert len(credit.groups[0].rewards) == 6


def test_all_switches_of_the_released_code_by_hand(three_levels: Tree) -> None:
    """As for the sums above: values 16/31 and -15/31, now times 6/5, as each is against the other five.

    Kept 0, 4 and 5, so the roots are of 3 responses for the whole and the trunk, of 2 for node 2. In units of 6/5 · 1/31:
    root 3/√3, trunk -13/√3, node 2 [0, 1) 17/√2, node 0 [2, 6) -15, node 4 16, node 5 -15. None equals its parent's.
    """
    credit = treerl_credit(
        three_levels, leaf_values="leave_one_out", token_mean="remove", node_values="sum", zero_local="copy", kept=[0, 4, 5]
    )
    assert [(s.node, s.start, s.end) for s in credit.spans] == [(0, 0, 2), (0, 2, 6), (2, 0, 1), (4, 0, 2), (5, 0, 2)]
    root, trunk, branch = 3 / 3**0.5, -13 / 3**0.5, 17 / 2**0.5
    expected = [
        2 * (trunk - root), (-15 - root) + (-15 - trunk), (branch - root) + (branch - trunk), (16 - root) + (16 - branch),
        (-15 - root) + (-15 - branch),
    ]  # fmt: skip
    assert _advantages(credit) == pytest.approx([a * 6 / 155 for a in expected])


def test_a_copied_change_is_copied_on() -> None:
    """Four successes below node 0, one part behind the other; node 1 fails: V(root) = 4/5, and the first change is 1/5.

    Node 0 is cut at 2, node 2 at 1: all parts behind the first have V = 1, so each takes the 1/5 of the part before.
    """
    tree = make_tree([(4, 1.0), (4, 0.0)], [(0, 2, [(3, 1.0), (2, 1.0)]), (2, 1, [(2, 1.0)])])
    found = {(s.node, s.start): s.advantage for s in treerl_credit(tree, zero_local="copy").spans}
    assert found == pytest.approx({
        (0, 0): 0.4 / 4**0.5, (0, 2): 0.4, (1, 0): -1.6, (2, 0): 0.4 / 2**0.5, (2, 1): 0.4, (3, 0): 0.4, (4, 0): 0.4,
    })  # fmt: skip


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_agreement_is_exactly_zero(reward: float) -> None:
    tree = make_tree([(4, reward)] * 7, [(0, 2, [(2, reward), (2, reward)])])
    for switches in ({}, {"node_values": "sum"}, {"leaf_values": "leave_one_out", "zero_local": "copy"}):
        assert not any(_advantages(treerl_credit(tree, **switches)))


# ---------------------------------------------------------------- against a slow version


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Any tree whose branches start between two tokens of a node."""
    reward = st.sampled_from([0.0, 0.25, 1.0])
    main = draw(st.lists(st.tuples(st.integers(1, 6), reward), min_size=2, max_size=4))
    lengths = [length for length, _ in main]
    branches: list[tuple[int, int, list[tuple[int, float]]]] = []
    for _ in range(draw(st.integers(0, 5))):
        parent = draw(st.integers(0, len(lengths) - 1))
        if lengths[parent] < 2:
            continue
        kids = draw(st.lists(st.tuples(st.integers(1, 4), reward), min_size=1, max_size=3))
        branches.append((parent, draw(st.integers(1, lengths[parent] - 1)), kids))
        lengths += [length for length, _ in kids]
    return make_tree(main, branches)


def _slowly(tree: Tree) -> dict[tuple[int, int], float]:
    """TreeRL's advantage of each token (node, offset), from the paths of all responses and nothing else."""
    paths = [[(n, t) for n, a, b in tree.spans(i) for t in range(a, b)] for i in range(len(tree.nodes))]
    below = {token: frozenset(i for i, path in enumerate(paths) if token in path) for path in paths for token in path}

    def value(leaves: frozenset[int]) -> float:
        return sum(tree.nodes[i].reward for i in leaves) / len(leaves)

    everything = frozenset(range(len(paths)))
    advantages: dict[tuple[int, int], float] = {}
    for path in paths:
        for place, token in enumerate(path):
            own = below[token]
            # the parent is the nearest token before it that other responses share as well
            parent = next((below[t] for t in reversed(path[:place]) if below[t] != own), everything)
            advantages[token] = (2 * value(own) - value(everything) - value(parent)) / len(own) ** 0.5
    return advantages


@examples(150)
@given(trees())
def test_equal_to_the_definition_token_by_token(tree: Tree) -> None:
    fast: dict[tuple[int, int], float] = {}
    for span in treerl_credit(tree).spans:
        for offset in range(span.start, span.end):
            assert (span.node, offset) not in fast
            fast[span.node, offset] = span.advantage
    assert fast == pytest.approx(_slowly(tree), abs=1e-12)


@examples(100)
@given(trees())
def test_changes_of_value_below_a_state_cancel_when_weighed_by_responses(tree: Tree) -> None:
    """V of a state is the mean of V of what follows it, each weighed by its responses."""
    parts = tree_parts(tree)
    values = [float(np.mean([tree.nodes[leaf].reward for leaf in part.leaves])) for part in parts]
    whole = float(np.mean([node.reward for node in tree.nodes]))
    for parent in range(ROOT, len(parts)):
        following = [i for i, part in enumerate(parts) if part.parent == parent]
        if following:
            before = whole if parent == ROOT else values[parent]
            assert sum(len(parts[i].leaves) * (values[i] - before) for i in following) == pytest.approx(0.0, abs=1e-9)


# ---------------------------------------------------------------- kept responses


def test_kept_responses_hold_a_success_if_there_is_one() -> None:
    rare = [make_tree([(5, 0.0)] * 29 + [(5, 1.0)], first_token=first, vocabulary=97) for first in range(40)]
    seen: Counter[int] = Counter()
    for tree in rare:
        kept = draw_leaves(tree, 16, 0.0)
        assert len(set(kept)) == 16 and 29 in kept and kept == sorted(kept)
        assert draw_leaves(tree, 16, 0.0) == kept  # the same tree, the same credit
        seen.update(kept)
    assert len(seen) == 30  # another tree, another draw
    assert len(draw_leaves(make_tree([(5, 0.0)] * 30), 16, 0.0)) == 16
    assert draw_leaves(make_tree([(5, 1.0)] * 3), 16, 0.0) == [0, 1, 2]


def test_each_failure_is_kept_as_often_as_any_other() -> None:
    """Ten responses, one success, four kept: a failure is one of three out of nine."""
    counts: Counter[int] = Counter()
    rewards = [(4, 0.0)] * 9 + [(4, 1.0)]
    draws = [make_tree(rewards, first_token=a, vocabulary=b) for a, b in itertools.product(range(60), [50, 90])]
    for tree in draws:
        counts.update(draw_leaves(tree, 4, 0.0))
    assert counts.pop(9) == len(draws) == 120
    # 120 draws: a standard deviation is .043
    assert [count / 120 for count in counts.values()] == pytest.approx([1 / 3] * 9, abs=0.16)


# ---------------------------------------------------------------- in a recipe


def test_sums_want_centred_values(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r'explore.node_values is "sum", but .* set explore.leaf_values = "leave_one_out" or'):
        recipe(explore={"type": "treerl", "node_values": "sum"})
    assert recipe(explore={"type": "treerl", "node_values": "sum", "token_mean": "remove"}).explore.most_branches == 4


def test_scaling_by_deviation_is_refused_in_words(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r'credit.scale is "std", .* "treerl" .* set credit.scale = "none"'):
        recipe(explore={"type": "treerl"}, credit={"scale": "std"})


def test_a_run_trains_every_sampled_token_at_most_once(recipe: Any) -> None:
    import json

    from deepgrpo.train.loop import train

    config = recipe(
        explore={"type": "treerl", "num_rollouts": 3, "num_rounds": 2}, run={"steps": 2},
        reward={"type": "task"}, loss={"beta": 0.0, "drop_zero_advantage": False},
    )  # fmt: skip
    rows = [json.loads(line) for line in (train(config) / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["ledger/trained_tokens"] == rows[-1]["ledger/sampled_tokens"] > 0
    assert rows[-1]["main/groups"] == 4 and rows[-1]["branch/rollouts"] > 0
