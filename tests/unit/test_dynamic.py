"""Dynamic sampling: which prompts are taken, which trees are kept, what is billed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import make_tree

from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.engines.base import SampleStats
from deepgrpo.errors import TrainingError
from deepgrpo.explore.grow import Growth
from deepgrpo.prompts.source import Cursor
from deepgrpo.records import Prompt, Tree
from deepgrpo.train.dynamic import Batch, dynamic_metrics, gather, has_signal, round_seed

MIXED = make_tree([(3, 1.0), (5, 0.0)])
SOLVED = make_tree([(3, 1.0), (5, 1.0)])
FAILED = make_tree([(4, 0.0), (6, 0.0)])
RESCUED = make_tree([(4, 0.0), (6, 0.0)], [(0, 2, [(2, 1.0), (3, 0.0)])])
HOPELESS = make_tree([(4, 0.0), (6, 0.0)], [(0, 2, [(2, 0.0), (3, 0.0)])])


class Script:
    """A source whose n-th prompt has the n-th tree; remembers what was asked of it."""

    def __init__(self, trees: Sequence[Tree]) -> None:
        self.trees, self.asked = trees, list[tuple[int, int]]()

    def take(self, cursor: Cursor, num_prompts: int) -> tuple[list[int], Cursor]:
        return list(range(cursor.position, cursor.position + num_prompts)), Cursor(0, cursor.position + num_prompts)

    def grow(self, prompts: Sequence[Prompt], number: int) -> Growth:
        self.asked.append((number, len(prompts)))
        trees = tuple(self.trees[i % len(self.trees)] for i in prompts)  # type: ignore[call-overload]
        tokens = sum(len(node.tokens) for tree in trees for node in tree.nodes)
        return Growth(trees, SampleStats(tokens, 3, 2, 0.5), len(trees), 0.25)

    def gather(self, num_prompts: int, **options: Any) -> Batch:
        return gather(self, Cursor(), num_prompts, self.grow, sibling_credit, **options)  # type: ignore[arg-type]


def test_a_reward_below_zero_does_not_go_with_the_mean_scale() -> None:
    script = Script([MIXED, make_tree([(3, 1.0), (5, -0.5)])])
    with pytest.raises(TrainingError, match=r'credit.scale is "mean", but a group has the reward -0.5'):
        gather(script, Cursor(), 2, script.grow, lambda tree: sibling_credit(tree, "mean"))  # type: ignore[arg-type]


def test_a_step_by_hand() -> None:
    """Three wanted. Round 0 takes 3 and keeps 1, round 1 takes 2 and keeps 1, round 2 takes 1 and keeps it."""
    script = Script([SOLVED, MIXED, FAILED, RESCUED, HOPELESS, MIXED, MIXED])
    batch = script.gather(3, dynamic=True, max_rounds=10)
    assert script.asked == [(0, 3), (1, 2), (2, 1)]
    assert batch.kept == (1, 3, 5) and batch.cursor == Cursor(0, 6) and batch.rounds == 3
    trees, credits = batch.trained
    assert trees == [MIXED, RESCUED, MIXED] and credits == [sibling_credit(tree) for tree in trees]
    assert batch.growth.trees == (SOLVED, MIXED, FAILED, RESCUED, HOPELESS, MIXED) and len(batch.credits) == 6
    # everything is paid for: 8 + 8 + 10 + 15 + 15 + 8 tokens
    assert batch.growth.stats == SampleStats(64, 9, 6, 1.5)
    assert (batch.growth.verifier_calls, batch.growth.seconds_reward) == (6, 0.75)
    assert dynamic_metrics(batch, 3, 0.0) == {
        "dynamic/rounds": 3, "dynamic/prompts": 6, "dynamic/kept": 3, "dynamic/missing": 0,
        "dynamic/dropped_solved": 1, "dynamic/dropped_failed": 2, "dynamic/dropped_other": 0,
        "dynamic/dropped_tokens": 8 + 10 + 15,
    }  # fmt: skip


def test_without_it_all_trees_are_trained_in_one_round() -> None:
    script = Script([SOLVED, FAILED, MIXED])
    batch = script.gather(3, max_rounds=10)
    assert script.asked == [(0, 3)] and batch.kept == (0, 1, 2) and batch.growth.trees == (SOLVED, FAILED, MIXED)


def test_rounds_end() -> None:
    script = Script([SOLVED, FAILED])
    batch = script.gather(4, dynamic=True, max_rounds=3)
    assert script.asked == [(0, 4), (1, 4), (2, 4)] and batch.trained == ([], [])
    metrics = dynamic_metrics(batch, 4, 0.0)
    assert metrics["dynamic/missing"] == 4 and metrics["dynamic/dropped_solved"] == metrics["dynamic/dropped_failed"] == 6


def test_a_mixed_group_without_credit_is_another_reason() -> None:
    batch = gather(
        Script([MIXED]), Cursor(), 1, Script([MIXED]).grow, lambda _: sibling_credit(FAILED), dynamic=True, max_rounds=1  # type: ignore[arg-type]
    )  # fmt: skip
    assert dynamic_metrics(batch, 1, 0.0)["dynamic/dropped_other"] == 1
    # rewards above the threshold are successes: nothing here is above 1
    assert dynamic_metrics(batch, 1, 1.0)["dynamic/dropped_failed"] == 1


@pytest.mark.parametrize(
    ("tree", "signal"), [(MIXED, True), (SOLVED, False), (FAILED, False), (RESCUED, True), (HOPELESS, False)]
)
def test_any_advantage_is_a_signal(tree: Tree, signal: bool) -> None:
    assert has_signal(sibling_credit(tree)) is signal


DATA = st.lists(st.sampled_from([MIXED, SOLVED, FAILED, RESCUED]), min_size=1, max_size=12)


@given(DATA, st.integers(1, 8), st.integers(1, 5))
def test_whatever_the_data(trees: list[Tree], wanted: int, max_rounds: int) -> None:
    script = Script(trees)
    batch = script.gather(wanted, dynamic=True, max_rounds=max_rounds)
    sampled = len(batch.growth.trees)
    assert sampled == batch.cursor.position == sum(count for _, count in script.asked) <= wanted * max_rounds
    assert len(batch.kept) <= wanted and batch.rounds <= max_rounds
    assert len(batch.kept) == wanted or batch.rounds == max_rounds
    # exactly those with a signal are kept, in order
    assert list(batch.kept) == [i for i, tree in enumerate(batch.growth.trees) if tree in (MIXED, RESCUED)]
    metrics = dynamic_metrics(batch, wanted, 0.0)
    reasons = sum(value for name, value in metrics.items() if name.startswith("dynamic/dropped_") and name[-6:] != "tokens")
    assert metrics["dynamic/kept"] + reasons == metrics["dynamic/prompts"] == sampled


def test_each_round_draws_for_itself() -> None:
    assert round_seed(7, 0) == 7  # the first as without dynamic sampling
    assert len({round_seed(seed, number) for seed in range(3) for number in range(4)}) == 12
