"""The uniform pivot: the control of deep, and deep's own switches for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from trees import make_tree

from deepgrpo.config import DeepExplore, ExploreConfig, RandomExplore
from deepgrpo.engines.base import SamplingParams
from deepgrpo.errors import ConfigError
from deepgrpo.explore import build_strategy
from deepgrpo.explore.base import Context, Limits
from deepgrpo.explore.grow import grow
from deepgrpo.explore.random import RandomStrategy, log_uniform
from deepgrpo.explore.toy import FakeEngine, Letters, decode, make_judge, make_prompt
from deepgrpo.records import ROOT, Tree

LIMITS = Limits(max_new_tokens=100, max_total_tokens=200)


def _strategy(**changes: Any) -> RandomStrategy:
    """Segments of two tokens."""
    config = RandomExplore.model_validate({"num_rollouts": 3, "branches_per_pivot": 2, **changes})
    return RandomStrategy(config, lambda tokens: [*range(2, len(tokens), 2), len(tokens)])


def _grow(config: ExploreConfig, seed: int) -> tuple[Tree, ...]:
    strategy = build_strategy(config, Context(tokenizer=Letters()))
    return grow(
        [make_prompt("a"), make_prompt("b")], strategy, strategy.initial_state(), FakeEngine(), make_judge("mixed", seed),
        decode=decode, params=SamplingParams(), limits=Limits(16, 24), seed=seed, step=1,
    ).trees  # fmt: skip


def test_the_rollouts_and_candidates_of_deep_each_as_likely() -> None:
    """Rollouts of 8 tokens in segments of 2: a chain of five, candidates 0, 2, 4, 6, each with probability 1/4."""
    tree, strategy = make_tree([(8, 0.0), (8, 1.0), (8, 0.0)]), _strategy()
    seen: Counter[int] = Counter()
    for seed in range(2000):
        pivots = strategy.plan(tree, {}, LIMITS, np.random.default_rng(seed))
        assert [p.parent for p in pivots] == [0, 2]  # the failed ones
        for pivot in pivots:
            assert pivot.candidates == (0, 2, 4, 6) and pivot.q == pytest.approx((0.25,) * 4)
            assert pivot.ratio == pytest.approx((pivot.candidates.index(pivot.offset) + 1) / 5)
            assert (pivot.num_branches, pivot.stream) == (2, "branch")
            seen[pivot.offset] += 1
    # 4000 draws: one standard deviation of a share is .0068
    assert [seen[offset] / 4000 for offset in (0, 2, 4, 6)] == pytest.approx([0.25] * 4, abs=0.03)


def test_switches_of_deep_are_here_too() -> None:
    tree, random = make_tree([(8, 0.0), (8, 1.0)]), np.random.default_rng(0)
    every = _strategy(expand="all", num_pivots=3, root_pivot=False).plan(tree, {}, LIMITS, random)
    assert sorted((p.parent, p.offset) for p in every) == [(0, 2), (0, 4), (0, 6), (1, 2), (1, 4), (1, 6)]
    assert {p.parent for p in _strategy(success_threshold=1.0).plan(tree, {}, LIMITS, random)} == {0, 1}
    short = _strategy(num_pivots=9).plan(tree, {}, Limits(3, 200), random)  # a state needs room for a token
    assert sorted(p.offset for p in short) == [0, 2]
    assert _strategy(root_pivot=False).plan(make_tree([(2, 0.0), (1, 0.0)]), {}, LIMITS, random) == []
    grown = make_tree([(8, 0.0)], [(0, 4, [(2, 1.0), (2, 0.0)])])
    assert _strategy().plan(grown, {}, LIMITS, random) == []
    assert _strategy().returns(0) and not _strategy().returns(1)


def test_no_pivots_are_root_and_it_remembers_nothing() -> None:
    strategy = _strategy(num_pivots=0, branches_per_pivot=1)
    tree = make_tree([(8, 0.0), (8, 1.0)])
    (first,) = strategy.plan(Tree(tree.prompt), {}, LIMITS, np.random.default_rng(0))
    assert (first.parent, first.num_branches, first.stream) == (ROOT, 3, "main")
    assert strategy.plan(tree, {}, LIMITS, np.random.default_rng(0)) == []
    assert not strategy.returns(0)
    assert strategy.initial_state() == strategy.observe({}, [tree]) == {}
    assert strategy.report({}) == {}


@examples(30)
@given(st.integers(0, 1000), st.integers(1, 3), st.sampled_from(["failed", "all"]), st.booleans())
def test_it_grows_the_trees_of_deep_without_depth_and_recoverability(
    seed: int, num_pivots: int, expand: str, root_pivot: bool
) -> None:
    shared = {
        "num_rollouts": 3, "num_pivots": num_pivots, "branches_per_pivot": 2, "expand": expand, "root_pivot": root_pivot,
        "segments": {"type": "tokens", "size": 3},
    }  # fmt: skip
    ours = _grow(RandomExplore.model_validate(shared), seed)
    flat = DeepExplore.model_validate({**shared, "gamma": 0.0, "recoverability": {"model": "uniform"}})
    theirs = _grow(flat, seed)
    assert [tree.nodes for tree in ours] == [tree.nodes for tree in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine.pivots, other.pivots, strict=True):
            assert (a.parent, a.offset, a.candidates, a.ratio) == (b.parent, b.offset, b.candidates, b.ratio)
            assert a.q == pytest.approx(b.q)


@given(st.integers(1, 200))
def test_q_is_uniform_and_sums_to_one(count: int) -> None:
    q = np.exp(log_uniform([(i + 1) / (count + 1) for i in range(count)]))
    assert q.sum() == pytest.approx(1.0)
    assert q.max() == q.min()


def test_one_branch_has_no_sibling(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"branches_per_pivot is 1, but a local baseline needs at least 2; set it to 2 or"):
        recipe(explore={"type": "random", "branches_per_pivot": 1})


def test_a_run_with_it_trains_both_streams(recipe: Any) -> None:
    import json

    from deepgrpo.train.loop import train

    config = recipe(
        explore={"type": "random", "num_rollouts": 4, "branches_per_pivot": 3, "segments": {"type": "tokens", "size": 4}},
        run={"steps": 2},
    )
    rows = [json.loads(line) for line in (train(config) / "metrics.jsonl").read_text().splitlines()]
    assert all(row["pivots/count"] > 0 for row in rows)
    assert rows[-1]["ledger/sampled_tokens"] > 0
