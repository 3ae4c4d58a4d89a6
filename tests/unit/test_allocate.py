"""Allocate: options and their worth, the counts, the price, and its special cases."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from trees import make_tree

from deepgrpo.config import AdaptiveExplore, AllocateExplore, RandomExplore, SegmentConfig
from deepgrpo.errors import ConfigError
from deepgrpo.explore.adaptive import AdaptiveStrategy
from deepgrpo.explore.allocate import AllocateStrategy, _rounds, key_of, tries_of
from deepgrpo.explore.base import Limits, main_pivot
from deepgrpo.explore.contract import World, grow_toy
from deepgrpo.explore.random import RandomStrategy
from deepgrpo.explore.segments import build_segmenter
from deepgrpo.explore.toy import make_prompt
from deepgrpo.records import Pivot, Tree

LIMITS = Limits(max_new_tokens=100, max_total_tokens=200)
BY_TWOS = build_segmenter(SegmentConfig(type="tokens", size=2), None)


def _strategy(**changes: Any) -> AllocateStrategy:
    return AllocateStrategy(AllocateExplore.model_validate({"num_rollouts": 2, "branches_per_pivot": 2, **changes}), BY_TWOS)


def _plan(strategy: AllocateStrategy, tree: Tree, state: Any = None, seed: int = 0) -> list[Pivot]:
    return strategy.plan(tree, state or strategy.initial_state(), LIMITS, np.random.default_rng(seed))


def _more_root(tree: Tree, *rewards: float) -> Tree:
    nodes = make_tree([(8, reward) for reward in rewards]).nodes
    return tree.add([main_pivot(len(rewards))], [replace(node, pivot=len(tree.pivots)) for node in nodes])


# ---------------------------------------------------------------- options


def test_a_solved_prompt_gets_nothing_and_a_mixed_one_no_more_root() -> None:
    assert _plan(_strategy(), make_tree([(8, 1.0), (8, 1.0)])) == []
    only_root = _strategy(depth_bins=0)
    assert _plan(only_root, make_tree([(8, 1.0), (8, 0.0)])) == []
    assert _plan(only_root, make_tree([(8, 0.0), (8, 0.0)])) == [main_pivot(2)]


def test_a_depth_is_one_pivot_in_every_failed_rollout() -> None:
    """8 tokens in 4 segments: candidates 2, 4, 6 with r = .4, .6, .8; with 5 bins each of its own."""
    strategy = _strategy(root=False, depth_bins=5)
    seen: Counter[int] = Counter()
    for seed in range(40):
        pivots = _plan(strategy, make_tree([(8, 0.0), (8, 1.0), (8, 0.0)]), seed=seed)
        assert [pivot.parent for pivot in pivots] == [0, 2]
        assert pivots[0].offset == pivots[1].offset  # one option per round
        assert pivots[0].q == (1.0,)
        seen[pivots[0].offset] += 1
    assert set(seen) == {2, 4, 6}  # without counts every depth is tried


def test_a_state_is_branched_once() -> None:
    strategy = _strategy(root=False, depth_bins=1, max_rounds=9)
    tree = make_tree([(8, 0.0), (8, 0.0)])
    offsets = []
    for _ in range(3):
        pivots = _plan(strategy, tree)
        offsets.append({pivot.offset for pivot in pivots if pivot.parent == 0})
        branches = make_tree([(8, 0.0), (8, 0.0)], [(p.parent, p.offset, [(2, 0.0)] * 2) for p in pivots]).nodes[2:]
        tree = tree.add(pivots, [replace(node, pivot=len(tree.pivots) + node.pivot - 1) for node in branches])
    assert set.union(*offsets) == {2, 4, 6}
    assert _plan(strategy, tree) == []


def test_rounds_are_counted_from_the_pivots() -> None:
    def tree(*pivots: Pivot) -> Tree:
        return replace(make_tree([(8, 0.0), (8, 0.0)]), pivots=(main_pivot(2), *pivots))

    assert _rounds(tree(), 4) == 1
    assert _rounds(tree(Pivot(0, 2, 2, ratio=0.4), Pivot(1, 2, 2, ratio=0.4)), 4) == 2
    assert _rounds(tree(Pivot(0, 2, 2, ratio=0.4), Pivot(0, 4, 2, ratio=0.45)), 4) == 3  # the same rollout again
    assert _rounds(tree(Pivot(0, 2, 2, ratio=0.4), Pivot(1, 6, 2, ratio=0.8)), 4) == 3  # another depth
    assert _rounds(tree(main_pivot(2), main_pivot(2)), 4) == 3
    strategy = _strategy(max_rounds=1)
    assert _plan(strategy, tree(main_pivot(2))) == []


# ---------------------------------------------------------------- worth


def test_the_option_with_more_mixed_groups_per_token_is_bought() -> None:
    """Root: 9 of 100 in 1,600 tokens; depth 3 of 4: 80 of 100 in 800. The draws are nearly the means."""
    strategy = _strategy()
    counts = {"root/0": [100, 9, 1600], "3/0": [100, 80, 800], "1/0": [100, 10, 800], "2/0": [100, 10, 800], "0/0": [9, 0, 90]}
    state = {**strategy.initial_state(), "counts": counts}
    for seed in range(20):
        pivots = _plan(strategy, make_tree([(8, 0.0), (8, 0.0)]), state, seed)
        assert [(pivot.parent, pivot.offset) for pivot in pivots] == [(0, 6), (1, 6)]
    # after a success the counts are others: there depth 3 is worth little
    counts = {**counts, "3/1": [100, 1, 800], "1/1": [100, 60, 800], "2/1": [100, 1, 800]}
    for seed in range(20):
        pivots = _plan(strategy, make_tree([(8, 0.0), (8, 1.0)]), {**state, "counts": counts}, seed)
        assert [(pivot.parent, pivot.offset) for pivot in pivots] == [(0, 2)]


def test_an_option_below_the_price_is_not_bought() -> None:
    """80 of 100 groups mixed in 800 tokens: .1 groups per token."""
    strategy = _strategy(root=False, depth_bins=1)
    counts = {"0/0": [1000, 800, 8000]}
    tree = make_tree([(8, 0.0), (8, 0.0)])
    assert _plan(strategy, tree, {**strategy.initial_state(), "counts": counts, "price": 0.08})
    assert not _plan(strategy, tree, {**strategy.initial_state(), "counts": counts, "price": 0.12})


# ---------------------------------------------------------------- learning


def test_tries_by_option_and_successes_before_them() -> None:
    """Two failures; branches at r = .6 of rollout 0, one right; then two more from the prompt, one right."""
    tree = make_tree([(8, 0.0), (8, 0.0)], [(0, 4, [(3, 1.0), (2, 0.0)])])
    tree = replace(tree, pivots=(tree.pivots[0], replace(tree.pivots[1], ratio=0.6)))
    tree = _more_root(tree, 1.0, 0.0)
    config = AllocateExplore(depth_bins=4)
    assert tries_of(tree, config) == [("2/0", 1, 5), ("root/0", 1, 16)]
    later = _more_root(tree, 0.0, 0.0)
    assert tries_of(later, config)[-1] == ("root/1", 1, 16)
    assert [key_of("3", n) for n in (0, 1, 2, 7)] == ["3/0", "3/1", "3/2+", "3/2+"]


def test_counts_fade_and_add_up() -> None:
    strategy = _strategy(depth_bins=4, memory=0.5)
    tree = make_tree([(8, 0.0), (8, 0.0)], [(0, 4, [(3, 1.0), (2, 0.0)])])
    tree = replace(tree, pivots=(tree.pivots[0], replace(tree.pivots[1], ratio=0.6)))
    once = strategy.observe(strategy.initial_state(), [tree, tree])
    assert once["counts"] == {"2/0": [2, 2, 10]}
    twice = strategy.observe(once, [tree])
    assert twice["counts"] == {"2/0": [2.0, 2.0, 10.0]}
    assert (twice["tokens"], twice["rounds"]) == (21.0, 1.0)
    assert json.loads(json.dumps(twice)) == twice
    assert strategy.report(twice)["allocate/mixed_per_1k_2/0"] == 200.0
    assert strategy.observe(twice, []) == twice


def test_the_price_moves_towards_the_allowance() -> None:
    strategy = _strategy(tokens_per_prompt=100.0)
    assert strategy._next_price(0.0, 50.0) == 0.0
    assert strategy._next_price(0.0, 150.0) == pytest.approx(1e-5)
    assert strategy._next_price(0.01, 150.0) == pytest.approx(0.01 * math.exp(0.25))
    assert strategy._next_price(0.01, 50.0) == pytest.approx(0.01 * math.exp(-0.25))
    assert strategy._next_price(0.01, 900.0) == pytest.approx(0.01 * math.exp(0.5))  # at most one step
    assert _strategy()._next_price(0.0, 9e9) == 0.0


def test_a_step_costs_about_its_allowance() -> None:
    """In a toy world whose prompts cost 34 tokens or more, the mean of later steps is near an allowance of 70."""
    def build(allowance: float | None) -> AllocateStrategy:
        return AllocateStrategy(
            AllocateExplore(num_rollouts=3, branches_per_pivot=3, max_rounds=4, tokens_per_prompt=allowance), BY_TWOS
        )

    prompts = [make_prompt(f"p{i}", 3) for i in range(12)]
    costs: dict[float | None, list[float]] = {}
    for allowance in (None, 70.0):
        strategy = build(allowance)
        state = strategy.initial_state()
        for step in range(50):
            trees = grow_toy(lambda a=allowance: build(a), World(0), prompts=prompts, state=state, step=step).trees
            state = strategy.observe(state, trees)
            costs.setdefault(allowance, []).append(state["tokens"])
    assert np.mean(costs[None][30:]) > 100
    assert np.mean(costs[70.0][30:]) == pytest.approx(70, rel=0.15)


# ---------------------------------------------------------------- special cases


def test_all_at_the_root_is_adaptive() -> None:
    ours = lambda: _strategy(num_rollouts=3, depth_bins=0, max_rounds=2)  # noqa: E731
    theirs = lambda: AdaptiveStrategy(AdaptiveExplore(round_rollouts=3, max_rollouts=9))  # noqa: E731
    compared = 0
    for seed in range(12):
        one, other = grow_toy(ours, World(seed)), grow_toy(theirs, World(seed))
        for mine, yours in zip(one.trees, other.trees, strict=True):
            if all(mine.nodes[i].reward > 0 for i in mine.children(0)):
                continue  # solved: `adaptive` goes on until one fails
            assert mine == yours
            assert one.strategy.credit(mine) == other.strategy.credit(yours)
            compared += len(mine.pivots) > 1
    assert compared >= 5


def test_one_depth_is_random() -> None:
    ours = lambda: _strategy(num_rollouts=3, branches_per_pivot=3, root=False, root_pivot=True, depth_bins=1, max_rounds=1)  # noqa: E731
    theirs = lambda: RandomStrategy(RandomExplore(num_rollouts=3, branches_per_pivot=3), BY_TWOS)  # noqa: E731
    for seed in range(8):
        one, other = grow_toy(ours, World(seed)), grow_toy(theirs, World(seed))
        assert one.trees == other.trees
        assert [one.strategy.credit(t) for t in one.trees] == [other.strategy.credit(t) for t in other.trees]


def test_a_recipe_without_options_is_refused(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"explore.root is false and explore.depth_bins is 0, so there is nowhere to sample"):
        recipe(explore={"type": "allocate", "root": False, "depth_bins": 0})
