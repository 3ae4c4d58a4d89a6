"""FR3E: which bases, which anchors, and advantages scaled by what a step gained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import make_tree

from deepgrpo.config import FR3EExplore
from deepgrpo.errors import ConfigError
from deepgrpo.explore.base import Limits
from deepgrpo.explore.fr3e import FR3EStrategy, anchors, value_steps
from deepgrpo.feedback import Reply, Score
from deepgrpo.records import ROOT, Node, Pivot, Tree
from deepgrpo.train.health import HealthMonitor
from deepgrpo.train.health_state import HealthState
from deepgrpo.train.metrics import tree_metrics

LIMITS = Limits(max_new_tokens=100, max_total_tokens=200)
RANDOM = np.random.default_rng(0)


def _strategy(**changes: Any) -> FR3EStrategy:
    scale = changes.pop("scale", "none")
    config = FR3EExplore.model_validate({"num_bases": 3, "num_anchors": 2, "rollouts_per_state": 4, **changes})
    return FR3EStrategy(config, scale)


def _with_logprobs(tree: Tree, index: int, logprobs: Sequence[float]) -> Tree:
    nodes = list(tree.nodes)
    nodes[index] = replace(nodes[index], logprobs=tuple(logprobs))
    return replace(tree, nodes=tuple(nodes))


def _grown(bases: Sequence[float], *states: tuple[int, int, Sequence[float]]) -> Tree:
    """Bases of 9 tokens with these rewards, and (parent, offset, rewards) of each state in order."""
    tree = make_tree([(9, reward) for reward in bases])
    for parent, offset, rewards in states:
        stream = "main" if parent == ROOT else "branch"
        nodes = [
            Node(parent, offset, (7, 8), (-1.0, -1.0), "stop", "text", Score(r), stream, len(tree.pivots)) for r in rewards
        ]
        tree = tree.add([Pivot(parent, offset, len(rewards), stream)], nodes)
    return tree


# ---------------------------------------------------------------- where


def test_the_least_likely_tokens_in_order_of_place_but_not_the_first() -> None:
    node = _with_logprobs(make_tree([(6, 0.0), (6, 0.0)]), 0, [-9.0, -1.0, -3.0, -1.0, -5.0, -3.0]).nodes[0]
    assert anchors(node, 2, room=100) == [2, 4]  # of two -3 the earlier one
    assert anchors(node, 3, room=100) == [2, 4, 5]
    assert anchors(node, 99, room=100) == [1, 2, 3, 4, 5]
    assert anchors(node, 2, room=4) == [1, 2]
    assert anchors(make_tree([(1, 0.0)]).nodes[0], 4, room=100) == []
    given = replace(node, replies=(Reply(2, 4),))  # tokens 2 and 3 are an environment's
    assert anchors(given, 99, room=100) == [1, 4, 5]


@pytest.mark.parametrize(
    ("rewards", "bases"),
    [([0, 1, 0], [0, 1]), ([1, 1, 0], [0, 2]), ([0, 0, 0], [0]), ([1, 1, 1], [0]), ([0.5, 0, 1], [0, 1])],
)
def test_one_base_of_each_outcome(rewards: list[float], bases: list[int]) -> None:
    tree = make_tree([(6, r) for r in rewards])
    pivots = _strategy().plan(tree, {}, LIMITS, RANDOM)
    # every base: the prompt once more, then the first two tokens that are as likely as all others
    assert [(p.parent, p.offset, p.num_branches, p.stream) for p in pivots] == [
        place for base in bases for place in ((ROOT, 0, 4, "main"), (base, 1, 4, "branch"), (base, 2, 4, "branch"))
    ]
    assert [p.ratio for p in pivots[1:3]] == pytest.approx([2 / 7, 3 / 7])


def test_two_rounds_and_a_threshold() -> None:
    strategy = _strategy(success_threshold=0.5)
    tree = make_tree([(6, 0.5), (6, 0.75), (6, 0.0)])
    (first,) = strategy.plan(Tree(tree.prompt), {}, LIMITS, RANDOM)
    assert (first.parent, first.num_branches, first.stream) == (ROOT, 3, "main")
    pivots = strategy.plan(tree, {}, LIMITS, RANDOM)
    assert {p.parent for p in pivots} == {ROOT, 0, 1}
    assert strategy.plan(tree.add(pivots, []), {}, LIMITS, RANDOM) == []
    assert strategy.returns(0) and not strategy.returns(1)
    assert strategy.observe({}, [tree]) == strategy.initial_state() == {}


def test_a_base_of_one_token_has_the_prompt_alone() -> None:
    assert [p.parent for p in _strategy().plan(make_tree([(1, 0.0)] * 3), {}, LIMITS, RANDOM)] == [ROOT]


# ---------------------------------------------------------------- how much


def test_what_a_state_gains_on_the_one_before() -> None:
    assert value_steps([0.5, 0.75, 0.25]) == pytest.approx([0.5, 0.25, -0.5])
    assert value_steps([1.0]) == pytest.approx([0.0])


def test_sharpened_by_hand() -> None:
    """|ΔV|^1.5 of .5, .25, -.5 are .3535534, .125, .3535534: sum .8321068."""
    assert value_steps([0.5, 0.75, 0.25], sharpen=True) == pytest.approx([0.4248894, 0.1502211, -0.4248894], abs=1e-6)
    assert value_steps([1.0, 1.0], sharpen=True).tolist() == [0.0, 0.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_steps_lead_from_the_first_value_to_the_last_and_sharp_ones_sum_to_one(values: list[float]) -> None:
    steps = value_steps(values)
    assert values[0] + steps[1:].sum() == pytest.approx(values[-1])
    sharp = value_steps(values, sharpen=True)
    assert np.abs(sharp).sum() == pytest.approx(1.0) or not np.abs(sharp).any()


def test_three_states_by_hand() -> None:
    """The prompt 1 of 4, the first anchor 2 of 4, the second 3 of 4: ΔV = 3/4, 1/4, 1/4.

    Rewards minus their mean: 3/4 and -1/4, 1/2 and -1/2, 1/4 and -3/4; divided by e^.75 = 2.1170000 and e^.25 = 1.2840254.
    """
    tree = _grown([0, 0, 0], (ROOT, 0, [1, 0, 0, 0]), (0, 2, [1, 1, 0, 0]), (0, 5, [1, 1, 1, 0]))
    credit = _strategy().credit(tree)
    assert [(s.node, s.start, s.end, s.stream) for s in credit.spans] == [(i, 0, 2, "main") for i in range(3, 15)]
    advantages = [s.advantage for s in credit.spans]
    assert advantages[:4] == pytest.approx([0.3542749, -0.1180916, -0.1180916, -0.1180916], abs=1e-7)
    assert advantages[4:8] == pytest.approx([0.3894004, 0.3894004, -0.3894004, -0.3894004], abs=1e-7)
    assert advantages[8:] == pytest.approx([0.1947002, 0.1947002, 0.1947002, -0.5841006], abs=1e-7)
    # the bases are not trained, nor a group
    assert [(g.stream, sum(g.rewards)) for g in credit.groups] == [("main", 1), ("branch", 2), ("branch", 3)]


def test_branches_that_learn_in_the_main_stream_are_no_empty_stream() -> None:
    """The groups of the anchors go by the name of the branches, while all is trained in the main stream."""
    tree = _grown([0, 0, 0], (ROOT, 0, [1, 0]), (0, 2, [1, 0]))
    credit = _strategy(rollouts_per_state=2).credit(tree)
    metrics = {**tree_metrics([tree], [credit]), "branch/sequences": 0.0, "loss/dropped_few_branches": 0.0}
    watch, state = HealthMonitor(max_new_tokens=100, dead_steps=2), HealthState()
    for _ in range(4):
        state, warnings = watch.check(state, metrics)
        assert warnings == ()


def test_each_base_has_its_own_prompt_and_its_own_steps() -> None:
    """The success: 1/2 at the prompt, 1 at its anchor. The failure: 1/2, then 0, then 1/2 again, which is a gain of 1/2."""
    half, every, none = [1, 0], [1, 1], [0, 0]
    tree = _grown([1, 0, 1], (ROOT, 0, half), (0, 3, every), (ROOT, 0, half), (1, 4, none), (1, 6, half))
    advantages = [s.advantage for s in _strategy(rollouts_per_state=2).credit(tree).spans]
    before = 0.5 / math.exp(0.5)
    assert advantages == pytest.approx([before, -before, 0, 0, before, -before, 0, 0, before, -before])
    # a fall from 1 to 1/2 makes the advantage larger
    falling = _grown([0, 0, 0], (ROOT, 0, every), (0, 4, half))
    assert [s.advantage for s in _strategy(rollouts_per_state=2).credit(falling).spans][2:] == pytest.approx(
        [0.5 * math.exp(0.5), -0.5 * math.exp(0.5)]
    )


def test_positive_advantages_are_not_successes_where_all_succeed() -> None:
    """Prompt: 2 of 2 succeed, none has a positive advantage. V = 1, or 0; then the anchor's ΔV is -1/2, or 1/2."""
    tree = _grown([1, 1, 1], (ROOT, 0, [1, 1]), (0, 4, [1, 0]))
    for values, gain in (("success", -0.5), ("positive_advantage", 0.5)):
        last = _strategy(rollouts_per_state=2, values=values).credit(tree).spans[-2]
        assert last.advantage == pytest.approx(0.5 / math.exp(gain))


def test_scale_by_deviation_comes_before_the_step() -> None:
    """Rewards 1, 0: deviation .7071068, so .5 / .7072068 = .7070068; then divided by e^.5."""
    tree = _grown([0, 0, 0], (ROOT, 0, [1, 0]))
    first = _strategy(rollouts_per_state=2, scale="std").credit(tree).spans[0]
    assert first.advantage == pytest.approx(0.7070068 / math.exp(0.5), abs=1e-6)


# ---------------------------------------------------------------- in a recipe


@pytest.mark.parametrize("bases", [1, 2, 4])
def test_most_rollouts_and_branches_bound_what_is_sampled(bases: int) -> None:
    config = FR3EExplore(num_bases=bases, num_anchors=4, rollouts_per_state=16)
    expanded = min(2, bases)
    assert config.num_rollouts == bases + 16 * expanded
    assert 0 <= config.num_rollouts * config.most_branches - 64 * expanded < config.num_rollouts


def test_a_state_needs_siblings(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"explore.rollouts_per_state is 1; it should be greater than or equal to 2"):
        recipe(explore={"type": "fr3e", "rollouts_per_state": 1})


def test_a_run_bills_the_bases_and_does_not_train_them(recipe: Any) -> None:
    import json

    from deepgrpo.runs.trees import load_trees
    from deepgrpo.train.loop import train

    config = recipe(
        explore={"type": "fr3e", "num_bases": 2, "num_anchors": 2, "rollouts_per_state": 3},
        run={"steps": 1}, log={"trees_every": 1}, loss={"beta": 0.0, "drop_zero_advantage": False},
    )  # fmt: skip
    directory = train(config)
    row = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    trees = list(load_trees(directory / "trees" / "step-000001.jsonl.gz"))
    assert row["ledger/sampled_tokens"] == sum(len(node.tokens) for tree in trees for node in tree.nodes)
    bases = sum(len(tree.nodes[i].tokens) for tree in trees for i in tree.children(0))
    assert row["ledger/trained_tokens"] == row["ledger/sampled_tokens"] - bases
