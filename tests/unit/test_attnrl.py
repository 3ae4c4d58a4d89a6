"""AttnRL: which rollouts are expanded, at which steps, and what the signal costs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import make_tree

from deepgrpo.config import AttnRLExplore
from deepgrpo.errors import ConfigError
from deepgrpo.explore import build_strategy
from deepgrpo.explore.attnrl import AttnRLStrategy, choose_steps, num_expanded
from deepgrpo.explore.base import ATTENTION, Context, Limits
from deepgrpo.model.signals import Steps, attention_influence
from deepgrpo.prompts import synthetic
from deepgrpo.records import Tree
from deepgrpo.runs.trees import load_trees
from deepgrpo.train.loop import train

LIMITS = Limits(max_new_tokens=100, max_total_tokens=200)


def _strategy(**changes: Any) -> AttnRLStrategy:
    """Steps of two tokens."""
    config = AttnRLExplore.model_validate({"branches_per_pivot": 3, **changes})
    return AttnRLStrategy(config, lambda tokens: [*range(2, len(tokens), 2), len(tokens)])


def _looked_at(tree: Tree, influence: dict[int, list[float]] | list[float]) -> Tree:
    """Main rollouts with a given influence for each of their steps of two tokens."""
    for index in tree.children(0):
        values = influence[index] if isinstance(influence, dict) else influence
        own = tuple(np.repeat(values, 2)[: len(tree.nodes[index].tokens)])
        tree = tree.with_signal(index, ATTENTION, own)
    return tree


# ---------------------------------------------------------------- how many rollouts


def test_the_more_succeed_the_fewer_are_expanded() -> None:
    """6 · e^0 = 6, 6 · e^(-1/6) = 5.08, 4.30, 3.64, 3.08, 2.61, 6/e = 2.21."""
    assert [num_expanded(s, 6) for s in range(7)] == [6, 5, 4, 4, 3, 3, 2]


@given(st.integers(2, 64), st.data())
def test_the_rarer_outcome_is_always_expanded_whole(rollouts: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, rollouts))
    rare = min(successes, rollouts - successes)
    assert rare <= num_expanded(successes, rollouts) <= rollouts


@pytest.mark.parametrize(
    ("rewards", "always", "count"),
    [
        ([0, 0, 0, 0, 0, 0], {0, 1, 2, 3, 4, 5}, 6),
        ([1, 0, 0, 0, 0, 0], {0}, 5),  # the success and four of the failures
        ([1, 1, 1, 1, 1, 0], {5}, 3),  # the failure and two of the successes
        ([1, 1, 1, 0, 0, 0], {3, 4, 5}, 4),  # a draw: the failures
        ([1, 1, 1, 1, 1, 1], set(), 2),
    ],
)
def test_which_rollouts_are_expanded(rewards: list[float], always: set[int], count: int) -> None:
    tree = _looked_at(make_tree([(8, r) for r in rewards]), [0.4, 0.3, 0.2, 0.1])
    strategy = _strategy(num_pivots=1)
    seen: Counter[int] = Counter()
    for seed in range(30):
        pivots = strategy.plan(tree, strategy.initial_state(), LIMITS, np.random.default_rng(seed))
        parents = [p.parent for p in pivots]
        assert len(parents) == len(set(parents)) == count and parents == sorted(parents)
        assert always <= set(parents)
        seen.update(parents)
    assert set(seen) == set(range(6))  # the others take turns


def test_solved_prompts_only_if_they_look_back_more_than_usual() -> None:
    tree = _looked_at(make_tree([(8, 1.0)] * 6), [0.4, 0.3, 0.2, 0.1])  # mean .25
    strategy, random = _strategy(), np.random.default_rng(0)
    start = strategy.initial_state()
    assert strategy.plan(tree, start, LIMITS, random)  # nothing to compare with yet
    assert not strategy.plan(tree, {**start, "prompts": 1, "mean": 0.25}, LIMITS, random)
    assert strategy.plan(tree, {**start, "prompts": 1, "mean": 0.24}, LIMITS, random)
    failed = _looked_at(make_tree([(8, 1.0)] * 5 + [(8, 0.0)]), [0.4, 0.3, 0.2, 0.1])
    assert strategy.plan(failed, {**start, "prompts": 1, "mean": 9.0}, LIMITS, random)


def test_the_running_mean_is_that_of_all_solved_prompts_so_far() -> None:
    strategy = _strategy()
    solved = [_looked_at(make_tree([(4, 1.0)] * 2), [a, a]) for a in (0.1, 0.2, 0.6)]
    other = _looked_at(make_tree([(4, 1.0), (4, 0.0)]), [9.0, 9.0])
    state = strategy.observe(strategy.initial_state(), [solved[0], other])
    assert strategy.report(state) == {
        "attnrl/influence_mean": pytest.approx(0.1), "attnrl/solved_prompts": 1, "attnrl/solved_left_out": 1,
    }  # fmt: skip
    expanded = _looked_at(make_tree([(4, 1.0)] * 2, [(0, 2, [(3, 1.0)] * 3)]), [0.6, 0.6])
    state = strategy.observe(state, [solved[1], expanded])
    assert state == {"prompts": 3, "mean": pytest.approx(0.3), "solved": 2, "left_out": 1}
    assert strategy.observe(state, []) == {**state, "solved": 0, "left_out": 0}


# ---------------------------------------------------------------- which steps


def _choose(influence: list[float], count: int = 2, **changes: Any) -> list[int]:
    settings = {"top_share": 0.2, "spacing": 0, "room": 1000, **changes}
    return choose_steps([10 * k for k in range(len(influence))], influence, count, **settings)


def test_the_earliest_of_the_most_influential_not_the_most_influential() -> None:
    #         0   1   2   3   4   5   6   7   8   9
    scores = [.9, .1, .5, .1, .6, .7, .1, .0, .0, .0]  # fmt: skip
    # sorted from the top .9 .7 .6 .5: with 10 values the quantile .8 lies at place 7.2, .6 + .2 · (.7 - .6) = .62
    assert _choose(scores, 1) == [5]
    assert _choose(scores, 1, top_share=0.4) == [2]  # place 5.4: .1 + .4 · (.5 - .1) = .26
    assert _choose(scores, 2, top_share=0.4) == [2, 4]
    # 2 is 20 from the start and 5 is 10 from 4, so 1 fills up
    assert _choose(scores, 2, top_share=0.4, spacing=30) == [1, 4]
    assert _choose(scores, 2, top_share=0.4, room=40) == [1, 2]  # 4 begins at the limit
    assert _choose(scores, 2, top_share=1.0) == [1, 2]


def test_too_few_candidates_are_filled_up_from_the_start_and_never_twice() -> None:
    assert _choose([0.5, 0.0, 0.0, 0.0]) == [1, 2]
    assert _choose([0.0, 0.0]) == [1]
    assert _choose([0.3]) == []
    assert _choose([0.1, 0.2, 0.9, 0.0, 0.0], 3) == [1, 2, 3]


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(1, 4), st.floats(0.05, 1.0), st.integers(0, 40),
    st.integers(1, 250),
)  # fmt: skip
def test_chosen_steps_are_distinct_later_ones_with_room(
    influence: list[float], count: int, top_share: float, spacing: int, room: int
) -> None:
    chosen = _choose(influence, count, top_share=top_share, spacing=spacing, room=room)
    possible = [k for k in range(1, len(influence)) if 10 * k < room]
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(possible)
    assert len(chosen) == min(count, len(possible))


def test_a_pivot_is_at_the_start_of_its_step() -> None:
    """Four steps of two tokens; the third has the most influence: it is written anew, from offset 4.

    The state before it is the end of segment 2 in the chain root, 2, 4, 6, 8: r = (2 + 1) / 5.
    """
    tree = _looked_at(make_tree([(8, 0.0), (8, 1.0)]), [0.3, 0.1, 0.5, 0.0])
    strategy = _strategy(num_pivots=1, num_rollouts=2)
    pivots = strategy.plan(tree, strategy.initial_state(), LIMITS, np.random.default_rng(0))
    assert {(p.offset, p.num_branches, p.stream) for p in pivots} == {(4, 3, "branch")}
    assert [p.ratio for p in pivots] == pytest.approx([0.6] * len(pivots))
    grown = tree.add(pivots, [])
    assert strategy.plan(grown, strategy.initial_state(), LIMITS, np.random.default_rng(0)) == []
    assert strategy.returns(0) and not strategy.returns(1)


def test_its_advantage_is_treerls() -> None:
    """Main rollouts 0, 1, 1; branches 1, 0, 0 behind four tokens of the first: V(root) = 3/6.

    node 0 [0, 4)  V = 1/4 of four: 2 · (1/4 - 1/2) / √4 = -1/4       node 0 [4, 8)  -1/2 - 1/4 = -3/4
    nodes 1 and 2  2 · (1 - 1/2) = 1                                  node 3  1/2 + 3/4 = 5/4      nodes 4 and 5  -3/4
    """
    tree = make_tree([(8, 0.0), (4, 1.0), (4, 1.0)], [(0, 4, [(2, 1.0), (3, 0.0), (2, 0.0)])])
    credit = _strategy().credit(tree)
    assert [(s.node, s.start, s.end) for s in credit.spans] == [
        (0, 0, 4), (0, 4, 8), (1, 0, 4), (2, 0, 4), (3, 0, 2), (4, 0, 3), (5, 0, 2),
    ]  # fmt: skip
    assert [s.advantage for s in credit.spans] == pytest.approx([-1 / 4, -3 / 4, 1, 1, 5 / 4, -3 / 4, -3 / 4])
    assert {s.stream for s in credit.spans} == {"main"} and len(credit.groups) == 1


# ---------------------------------------------------------------- in a run


RECIPE: dict[str, Any] = {
    "explore": {
        "type": "attnrl", "num_rollouts": 4, "lag": 1, "segments": {"type": "tokens", "size": 4},
    },
    "run": {"steps": 2}, "log": {"trees_every": 1},
}  # fmt: skip


def test_a_run_measures_every_main_rollout_and_bills_it(recipe: Any) -> None:
    import json

    directory = train(recipe(**RECIPE))
    trees = [list(load_trees(directory / "trees" / f"step-00000{i}.jsonl.gz")) for i in (1, 2)]
    cost = 0
    for tree in (tree for step in trees for tree in step):
        for node in tree.nodes:
            assert (ATTENTION in node.signals) == (node.stream == "main")
            if node.stream == "main":
                assert len(node.signals[ATTENTION]) == len(node.tokens)
                # with one step there is nothing to ask
                cost += (len(tree.prompt.tokens) + len(node.tokens)) * (len(node.tokens) > 4)
        for pivot in tree.pivots[1:]:
            assert pivot.offset % 4 == 0 and pivot.offset > 0
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["ledger/signal_tokens"] == cost > 0
    assert rows[-1]["ledger/seconds_signals"] > 0
    assert rows[-1]["time/signals"] > 0
    assert any(row["pivots/count"] > 0 for row in rows)


def test_influence_is_that_of_the_policy_that_sampled(recipe: Any, policy: Any) -> None:
    """The saved signal of the first step is what the start model says of that rollout."""
    from deepgrpo.train.setup import open_run

    config = recipe(**{**RECIPE, "run": {"steps": 1}})
    start = open_run(config.model_copy(update={"run": config.run.model_copy(update={"name": "other"})}), None).policy
    tree = next(load_trees(train(config) / "trees" / "step-000001.jsonl.gz"))
    node, offset = tree.nodes[0], len(tree.prompt.tokens)
    ends = [*range(4, len(node.tokens), 4), len(node.tokens)]
    (expected,) = attention_influence(start, [Steps(tree.path(0), (offset, *(offset + e for e in ends)))], 1)
    assert [node.signals[ATTENTION][e - 1] for e in ends] == pytest.approx(list(expected), abs=1e-5)


def test_resume_goes_on_with_the_running_mean(recipe: Any) -> None:
    strategy = build_strategy(AttnRLExplore(), Context(tokenizer=synthetic.tokenizer()))
    import json

    tree = _looked_at(make_tree([(4, 1.0)] * 2), [0.2, 0.2])
    odd = replace(_strategy(), config=AttnRLExplore())
    state = odd.observe(strategy.initial_state(), [tree])
    assert json.loads(json.dumps(state)) == state
    assert math.isclose(state["mean"], 0.2)


def test_scaling_by_deviation_is_refused_in_words(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r'credit.scale is "std", .* "attnrl" .* set credit.scale = "none"'):
        recipe(explore={"type": "attnrl"}, credit={"scale": "std"})
