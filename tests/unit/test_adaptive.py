"""Adaptive root sampling: rounds until outcomes differ, one pooled group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from trees import make_tree

from deepgrpo.config import AdaptiveExplore, RootExplore
from deepgrpo.credit.siblings import pooled_credit, sibling_credit
from deepgrpo.errors import ConfigError
from deepgrpo.explore.adaptive import AdaptiveStrategy
from deepgrpo.explore.base import Limits, main_pivot
from deepgrpo.explore.contract import World, grow_toy
from deepgrpo.explore.root import RootStrategy
from deepgrpo.records import Tree

LIMITS = Limits(max_new_tokens=100, max_total_tokens=200)


def _planned(tree: Tree, **changes: Any) -> list[int]:
    """Rollouts that are asked for next."""
    strategy = AdaptiveStrategy(AdaptiveExplore.model_validate({"round_rollouts": 3, "max_rollouts": 8, **changes}))
    pivots = strategy.plan(tree, {}, LIMITS, np.random.default_rng(0))
    assert all((pivot.parent, pivot.offset, pivot.stream) == (-1, 0, "main") for pivot in pivots)
    return [pivot.num_branches for pivot in pivots]


@pytest.mark.parametrize(
    ("rewards", "changes", "asked"),
    [
        ([], {}, [3]),
        ([0, 0, 0], {}, [3]),  # all fail
        ([1, 1, 1], {}, [3]),  # all succeed
        ([0, 1, 0], {}, []),
        ([0, 1, 0], {"min_successes": 2}, [3]),
        ([0, 1, 1], {"min_failures": 2}, [3]),
        ([0, 0, 0, 0, 0, 0], {}, [2]),  # what the allowance of 8 leaves
        ([0] * 8, {}, []),
        ([0.5, 0, 0], {"success_threshold": 0.5}, [3]),  # at the threshold is no success
    ],
)
def test_rounds_until_outcomes_differ_or_the_allowance_is_spent(
    rewards: list[float], changes: dict[str, Any], asked: list[int]
) -> None:
    tree = make_tree([(4, float(reward)) for reward in rewards]) if rewards else Tree(make_tree([(4, 0.0)]).prompt)
    assert _planned(tree, **changes) == asked


def _two_rounds(*rounds: tuple[float, ...]) -> Tree:
    """Rollouts of several rounds, with 4 tokens each."""
    tree = Tree(make_tree([(4, 0.0)]).prompt)
    for number, rewards in enumerate(rounds):
        nodes = make_tree([(4, reward) for reward in rewards]).nodes
        tree = tree.add([main_pivot(len(rewards))], [replace(node, pivot=number) for node in nodes])
    return tree


def test_all_rounds_are_one_group() -> None:
    """Rewards (0, 0) and (1, 0): the mean is 1/4. By rounds, the first would have no advantage and the second ±1/2."""
    tree = _two_rounds((0.0, 0.0), (1.0, 0.0))
    credit = pooled_credit(tree)
    assert [span.advantage for span in credit.spans] == [-0.25, -0.25, 0.75, -0.25]
    assert [group.rewards for group in credit.groups] == [(0.0, 0.0, 1.0, 0.0)]
    assert [span.advantage for span in sibling_credit(tree).spans] == [0.0, 0.0, 0.5, -0.5]


@pytest.mark.parametrize(
    ("rounds", "keep", "trained"),
    [
        (((0, 0), (1, 0)), 2, {0: -0.25, 2: 0.75}),
        (((0, 0), (1, 0)), 3, {0: -0.25, 1: -0.25, 2: 0.75}),
        (((1, 1, 1), (1, 1, 0)), 4, {0: 1 / 6, 1: 1 / 6, 2: 1 / 6, 5: -5 / 6}),  # one failure, filled up with successes
        (((0, 1), (0, 1)), 4, {0: -0.5, 1: 0.5, 2: -0.5, 3: 0.5}),
        (((0, 1), (0, 1)), 9, {0: -0.5, 1: 0.5, 2: -0.5, 3: 0.5}),
        (((0, 0), (0, 0)), 2, {0: 0.0, 1: 0.0}),
    ],
)
def test_a_balanced_part_is_trained_against_the_mean_of_all(
    rounds: tuple[tuple[float, ...], ...], keep: int, trained: dict[int, float]
) -> None:
    tree = _two_rounds(*rounds)
    assert {span.node: span.advantage for span in pooled_credit(tree, keep=keep).spans} == pytest.approx(trained)


def test_one_round_is_grpo() -> None:
    adaptive = lambda: AdaptiveStrategy(AdaptiveExplore(round_rollouts=5, max_rollouts=5))  # noqa: E731
    grpo = lambda: RootStrategy(RootExplore(num_rollouts=5))  # noqa: E731
    for seed in range(5):
        ours, theirs = grow_toy(adaptive, World(seed)), grow_toy(grpo, World(seed))
        assert ours.trees == theirs.trees
        assert [ours.strategy.credit(t) for t in ours.trees] == [theirs.strategy.credit(t) for t in theirs.trees]


def test_metrics_are_those_of_the_step() -> None:
    strategy = AdaptiveStrategy(AdaptiveExplore(round_rollouts=2, max_rollouts=4))
    state = strategy.observe(strategy.initial_state(), [_two_rounds((0, 0), (0, 0)), _two_rounds((1, 0))])
    assert strategy.report(state) == {"adaptive/rollouts": 3.0, "adaptive/spent": 0.5}
    assert strategy.observe(state, []) == state


def test_an_allowance_below_a_round_is_refused(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"explore.max_rollouts is 4, but a round has explore.round_rollouts = 8; raise"):
        recipe(explore={"type": "adaptive", "max_rollouts": 4})
