"""The worked example in the docstring of records.py, in numbers."""

from __future__ import annotations

import dataclasses

import pytest

from deepgrpo.feedback import Score
from deepgrpo.ledger import Ledger
from deepgrpo.records import ROOT, Completion, FinishReason, Group, Node, Pivot, Prompt, Tree

PROMPT = Prompt(id="p", text="abc", tokens=(1, 2, 3), question="abc", answer="1")


def node(parent: int, offset: int, tokens: tuple[int, ...], pivot: int, reward: float) -> Node:
    return Node(
        parent=parent,
        offset=offset,
        tokens=tokens,
        logprobs=(-1.0,) * len(tokens),
        finish="stop",
        text="…",
        score=Score(reward),
        stream="main" if parent == ROOT else "branch",
        pivot=pivot,
    )


@pytest.fixture
def tree() -> Tree:
    """Two main rollouts of 6 and 5 tokens; two branches of 2 and 3 tokens after token 4 of the first."""
    grown = Tree(PROMPT).add(
        [Pivot(ROOT, 0, num_branches=2, stream="main")],
        [node(ROOT, 0, (10, 11, 12, 13, 14, 15), 0, 0.0), node(ROOT, 0, (20, 21, 22, 23, 24), 0, 1.0)],
    )
    return grown.add(
        [Pivot(parent=0, offset=4, num_branches=2)],
        [node(0, 4, (30, 31), 1, 1.0), node(0, 4, (40, 41, 42), 1, 0.0)],
    )


def test_spans_lead_from_the_root_to_the_node(tree: Tree) -> None:
    assert tree.spans(2) == [(0, 0, 4), (2, 0, 2)]
    assert tree.spans(3) == [(0, 0, 4), (3, 0, 3)]
    assert tree.spans(0) == [(0, 0, 6)]
    assert tree.spans(2, upto=1) == [(0, 0, 4), (2, 0, 1)]
    assert tree.spans(2, upto=0) == [(0, 0, 4), (2, 0, 0)]


def test_a_path_is_the_prompt_and_the_shared_prefix_and_the_own_tokens(tree: Tree) -> None:
    # 3 prompt tokens + t0..t3 + b0 b1 = 9
    assert tree.path(2) == (1, 2, 3, 10, 11, 12, 13, 30, 31)
    assert tree.response(2) == (10, 11, 12, 13, 30, 31)
    assert tree.response(3, upto=2) == (10, 11, 12, 13, 40, 41)
    assert tree.path(1) == (1, 2, 3, 20, 21, 22, 23, 24)
    assert tree.response(ROOT) == ()
    assert tree.path(ROOT) == PROMPT.tokens


def test_a_branch_of_a_branch(tree: Tree) -> None:
    deeper = tree.add([Pivot(parent=3, offset=1, num_branches=2)], [node(3, 1, (50,), 2, 1.0)])
    # 4 tokens of node 0, 1 of node 3, 1 of its own
    assert deeper.spans(4) == [(0, 0, 4), (3, 0, 1), (4, 0, 1)]
    assert deeper.response(4) == (10, 11, 12, 13, 40, 50)
    assert deeper.children(2) == [4]


def test_children_are_the_nodes_of_a_pivot_in_order(tree: Tree) -> None:
    assert tree.children(0) == [0, 1]
    assert tree.children(1) == [2, 3]
    assert tree.children(2) == []


def test_streams(tree: Tree) -> None:
    assert [i for i, _ in tree.stream("main")] == [0, 1]
    assert [(i, n.reward) for i, n in tree.stream("branch")] == [(2, 1.0), (3, 0.0)]


def test_every_token_is_owned_once(tree: Tree) -> None:
    assert sum(len(n.tokens) for n in tree.nodes) == 6 + 5 + 2 + 3


def test_add_leaves_the_old_tree_alone(tree: Tree) -> None:
    before = tree.nodes
    tree.add([Pivot(ROOT, 0, 1)], [node(ROOT, 0, (9,), 2, 0.0)])
    assert tree.nodes is before


def test_records_are_frozen(tree: Tree) -> None:
    for record, field in [(tree, "nodes"), (tree.nodes[0], "score"), (PROMPT, "id"), (Ledger(), "sampled_tokens")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, field, None)
    assert hash(Completion((1,), (0.0,), "stop")) == hash(Completion((1,), (0.0,), "stop"))


def test_a_group_is_mixed_if_its_rewards_differ() -> None:
    assert Group("main", (0.0, 1.0)).mixed
    assert not Group("main", (1.0, 1.0)).mixed
    # rounding is no signal
    assert not Group("branch", (0.1 + 0.2, 0.3)).mixed


def test_ledgers_add_field_by_field() -> None:
    total = Ledger(sampled_tokens=4096, seconds_learn=0.5) + Ledger(sampled_tokens=4, verifier_calls=72)
    assert total == Ledger(sampled_tokens=4100, verifier_calls=72, seconds_learn=0.5)
    assert total + Ledger() == total
    # 4,100 · 1.5 = 6,150, 72 · 1.5 = 108, and a count is rounded down: 3 · 1.5 = 4.5
    assert total * 1.5 == Ledger(sampled_tokens=6150, verifier_calls=108, seconds_learn=0.75)
    assert Ledger(optimizer_steps=3) * 1.5 == Ledger(optimizer_steps=4)
    assert Ledger(sampled_tokens=9, seconds_sample=0.5, seconds_save=0.25).seconds == 0.75
    ones = Ledger(**{field.name: 1 for field in dataclasses.fields(Ledger)})
    assert set(ones.as_dict()) - set(Ledger().as_dict()) == {"given_tokens", "tool_calls", "seconds_tools"}
    assert set((ones + ones).as_dict().values()) == {2}
    assert list(ones.as_dict()) == [field.name for field in dataclasses.fields(Ledger)]


def test_a_truncated_response_is_complete_and_a_segment_is_not() -> None:
    sampled = node(ROOT, 0, (1, 2), 0, 0.0)
    finishes: tuple[FinishReason, ...] = ("stop", "length", "segment")
    assert [dataclasses.replace(sampled, finish=finish).complete for finish in finishes] == [True, True, False]
