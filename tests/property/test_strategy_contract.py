"""What every strategy of the recipe must keep to, grown by the real loop from an engine without a model.

A strategy that is added to `ExploreConfig` is tested here without further ado, with its defaults; a line in CONFIGS makes it
smaller.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from deepgrpo import rng
from deepgrpo.config import ExploreConfig, tables_of
from deepgrpo.credit.group import STD_EPSILON
from deepgrpo.engines.base import SamplingParams
from deepgrpo.explore import build_strategy
from deepgrpo.explore.base import Limits, Signal, State, Strategy
from deepgrpo.explore.grow import Growth, grow
from deepgrpo.loss.streams import ZERO_ADVANTAGE
from deepgrpo.pack.layout import lay_out
from deepgrpo.records import ROOT, Pivot, Prompt, Tree
from deepgrpo.runs.trees import load_trees, save_trees
from fakes import FakeEngine, Lengths, Letters, Rewards, decode, make_judge, make_prompt

LIMITS = Limits(max_new_tokens=16, max_total_tokens=24)
PROMPTS = [make_prompt("a", 3), make_prompt("b", 8), make_prompt("c", 15)]  # the last two leave room for 16 and 9 tokens
SEGMENTS = {"type": "tokens", "size": 3}

CONFIGS: dict[str, dict[str, Any]] = {
    "root": {"num_rollouts": 3},
    "deep": {"num_rollouts": 3, "num_pivots": 2, "branches_per_pivot": 3, "segments": SEGMENTS},
    "random": {"num_rollouts": 3, "num_pivots": 2, "branches_per_pivot": 3, "segments": SEGMENTS},
    "treerl": {"num_rollouts": 3, "num_rounds": 2},
    "fr3e": {"num_bases": 3, "num_anchors": 3, "rollouts_per_state": 3},
    "spo_tree": {"branching": [3, 2, 2], "segment_tokens": 4},
    "attnrl": {"num_rollouts": 4, "lag": 1, "segments": SEGMENTS},
    "oracle": {"num_rollouts": 4, "branches_per_pivot": 3},
}
TYPES = [model.model_fields["type"].default for model in tables_of(ExploreConfig)]
VARIANTS: list[dict[str, Any]] = [
    {"type": "deep", "expand": "all", "root_pivot": False},
    {"type": "deep", "num_pivots": 0},
    {"type": "random", "expand": "all", "root_pivot": False},
    {"type": "treerl", "skip_first": 0.2, "skip_last": 2, "mask_after": ["e"], "num_pivots": 3},
    {
        "type": "treerl", "keep_leaves": 5, "leaf_values": "leave_one_out", "token_mean": "remove", "node_values": "sum",
        "zero_local": "copy",
    },
    {"type": "fr3e", "values": "positive_advantage", "sharpen": True},
    {"type": "fr3e", "num_bases": 1},
    {"type": "spo_tree", "advantage": "siblings"},
]  # fmt: skip
ALL = [{**CONFIGS.get(kind, {}), "type": kind} for kind in TYPES] + [{**CONFIGS[v["type"]], **v} for v in VARIANTS]


def _compares_siblings(config: dict[str, Any]) -> bool:
    """Whether advantages are taken against siblings; else they are changes of value along the tree."""
    along = config["type"] in ("treerl", "attnrl") or (config["type"] == "spo_tree" and "advantage" not in config)
    return not along


def _name(config: dict[str, Any]) -> str:
    """The type, and what a variant changes of its configuration above."""
    usual = CONFIGS.get(config["type"], {})
    changes = [f"{key}={value}" for key, value in config.items() if key != "type" and usual.get(key) != value]
    return "-".join([config["type"], *changes])


every_strategy = pytest.mark.parametrize("config", ALL, ids=_name)
worlds = given(
    st.integers(0, 10_000), st.sampled_from(["mixed", "mixed", "graded", "all right", "all wrong"]),
    st.sampled_from(["any", "any", "one", "endless"]),
)  # fmt: skip
few = settings(max_examples=20, deadline=None)


class _Task:
    """Knows a first error in most responses, at a place of its own choosing."""

    def first_error(self, prompt: Prompt, response: str) -> int | None:
        place = rng.key("first error", response) % (len(response) + 2)
        return None if place > len(response) else place


class Watched:
    """A strategy of which one can ask in which round it planned each pivot of a prompt."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.levels: dict[str, list[int]] = {}

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        pivots = self.strategy.plan(tree, state, limits, random)
        levels = self.levels.setdefault(tree.prompt.id, [])
        levels += [levels[-1] + 1 if levels else 0] * len(pivots)
        return pivots

    def __getattr__(self, name: str) -> Any:
        return getattr(self.strategy, name)


def _influence(signal: Signal, nodes: Sequence[tuple[Tree, int]]) -> tuple[list[np.ndarray], int]:
    """Any numbers, as long as they depend on the response alone."""
    keys = [rng.key(signal.name, *tree.response(index)) for tree, index in nodes]
    counts = [len(tree.nodes[index].tokens) for tree, index in nodes]
    return [rng.uniforms([key] * count, range(count)) for key, count in zip(keys, counts, strict=True)], sum(counts)


@dataclass(frozen=True)
class Grown:
    strategy: Watched
    engine: FakeEngine
    growth: Growth

    @property
    def trees(self) -> tuple[Tree, ...]:
        return self.growth.trees


def _build(config: dict[str, Any], scale: Literal["none", "std"] = "none") -> Strategy:
    section = TypeAdapter(ExploreConfig).validate_python(config)
    return build_strategy(section, scale=scale, tokenizer=Letters(), task=_Task())


def _grow(
    config: dict[str, Any], seed: int, rewards: Rewards, lengths: Lengths, *, prompts: Sequence[Prompt] = PROMPTS,
    state: State | None = None, step: int = 1,
) -> Grown:  # fmt: skip
    strategy, engine = Watched(_build(config)), FakeEngine(lengths)
    growth = grow(
        prompts, strategy, strategy.initial_state() if state is None else state, engine, make_judge(rewards, seed),
        decode=decode, params=SamplingParams(), limits=LIMITS, seed=seed, step=step, signals=_influence,
    )  # fmt: skip
    return Grown(strategy, engine, growth)


# ---------------------------------------------------------------- what is grown


@every_strategy
@few
@worlds
def test_every_sampled_token_is_in_one_node_and_billed_once(
    config: dict[str, Any], seed: int, rewards: Rewards, lengths: Lengths
) -> None:
    grown = _grow(config, seed, rewards, lengths)
    nodes = [node for tree in grown.trees for node in tree.nodes]
    assert sum(len(node.tokens) for node in nodes) == grown.growth.stats.sampled_tokens
    assert len(nodes) == len(grown.engine.keys) == len(set(grown.engine.keys))  # no draw is used twice
    assert grown.growth.verifier_calls == sum(node.complete for node in nodes)
    assert all(len(node.tokens) == len(node.logprobs) > 0 for node in nodes)


@every_strategy
@few
@worlds
def test_trees_keep_to_the_limits_and_branch_where_there_is_room(
    config: dict[str, Any], seed: int, rewards: Rewards, lengths: Lengths
) -> None:
    for tree in _grow(config, seed, rewards, lengths).trees:
        room = LIMITS.response(tree)
        assert tree.pivots[0].parent == ROOT
        for index, node in enumerate(tree.nodes):
            assert len(tree.response(index)) <= room
            pivot = tree.pivots[node.pivot]
            assert (node.parent, node.offset, node.stream) == (pivot.parent, pivot.offset, pivot.stream)
        for number, pivot in enumerate(tree.pivots):
            children = tree.children(number)
            assert len(children) == pivot.num_branches > 0
            assert len(tree.response(pivot.parent, pivot.offset)) < room
            assert 0 <= pivot.ratio <= 1
            if pivot.parent == ROOT:
                assert pivot.offset == 0
                continue
            parent = tree.nodes[pivot.parent]
            assert pivot.parent < min(children)
            # nothing goes on behind the end of a response; a segment goes on at its end only
            if parent.complete:
                assert 0 <= pivot.offset < len(parent.tokens)
            else:
                assert pivot.offset == len(parent.tokens)


@every_strategy
@few
@worlds
def test_a_strategy_says_to_which_rounds_it_returns_and_comes_to_an_end(
    config: dict[str, Any], seed: int, rewards: Rewards, lengths: Lengths
) -> None:
    grown = _grow(config, seed, rewards, lengths)
    strategy = grown.strategy
    assert grown.engine.kept == [strategy.returns(level) for level in range(len(grown.engine.kept))]
    for place, tree in enumerate(grown.trees):
        levels = strategy.levels[tree.prompt.id]
        assert len(levels) == len(tree.pivots)
        for pivot in tree.pivots:
            if pivot.parent != ROOT:
                assert strategy.returns(levels[tree.nodes[pivot.parent].pivot])
        # asked again as `grow` asked it last
        random = rng.generator(seed, 1, place, tree.prompt.id, "plan", levels[-1] + 1)
        assert strategy.strategy.plan(tree, strategy.initial_state(), LIMITS, random) == []


@every_strategy
@few
@worlds
def test_same_seed_same_tree_whatever_else_is_in_the_batch(
    config: dict[str, Any], seed: int, rewards: Rewards, lengths: Lengths
) -> None:
    first = _grow(config, seed, rewards, lengths).trees
    assert _grow(config, seed, rewards, lengths).trees == first
    others = [make_prompt("x", 5), PROMPTS[1], make_prompt("y", 2), make_prompt("z", 3)]
    assert _grow(config, seed, rewards, lengths, prompts=others).trees[1] == first[1]
    alone = _grow(config, seed, rewards, lengths, prompts=PROMPTS[:1]).trees[0]
    assert alone == first[0]


# ---------------------------------------------------------------- credit


@every_strategy
@few
@worlds
def test_credit_stays_inside_nodes_and_trains_no_token_twice(
    config: dict[str, Any], seed: int, rewards: Rewards, lengths: Lengths
) -> None:
    grown = _grow(config, seed, rewards, lengths)
    credits = [grown.strategy.credit(tree) for tree in grown.trees]
    assert credits == [grown.strategy.credit(tree) for tree in grown.trees]
    total = 0
    for tree, credit in zip(grown.trees, credits, strict=True):
        trained: set[tuple[int, int]] = set()
        for span in credit.spans:
            assert 0 <= span.start < span.end <= len(tree.nodes[span.node].tokens)
            tokens = {(span.node, offset) for offset in range(span.start, span.end)}
            assert not trained & tokens
            assert np.isfinite(span.advantage)
            trained |= tokens
        total += len(trained)
        assert credit.groups and all(len(group.rewards) > 1 for group in credit.groups)
        if rewards in ("all right", "all wrong"):
            assert all(abs(span.advantage) < ZERO_ADVANTAGE for span in credit.spans)
            assert not any(group.mixed for group in credit.groups)
    layout = lay_out(grown.trees, credits)  # what the learner makes of it
    assert len(layout.terms) == total


@pytest.mark.parametrize("config", [c for c in ALL if _compares_siblings(c)], ids=_name)
@few
@worlds
def test_advantages_of_siblings_sum_to_zero(config: dict[str, Any], seed: int, rewards: Rewards, lengths: Lengths) -> None:
    grown = _grow(config, seed, rewards, lengths)
    for tree in grown.trees:
        credit = grown.strategy.credit(tree)
        advantages: dict[int, list[float]] = {}
        for span in credit.spans:
            assert (span.start, span.end) == (0, len(tree.nodes[span.node].tokens))
            advantages.setdefault(tree.nodes[span.node].pivot, []).append(span.advantage)
        for pivot, of_siblings in advantages.items():
            assert len(of_siblings) == tree.pivots[pivot].num_branches
            assert sum(of_siblings) == pytest.approx(0.0, abs=1e-9)
        assert len(advantages) == len(credit.groups)


@pytest.mark.parametrize("config", [c for c in ALL if _compares_siblings(c)], ids=_name)
@few
@worlds
def test_scale_divides_each_group_by_its_own_deviation(
    config: dict[str, Any], seed: int, rewards: Rewards, lengths: Lengths
) -> None:
    plain, scaled = _build(config), _build(config, "std")
    for tree in _grow(config, seed, rewards, lengths).trees:
        credit, other = plain.credit(tree), scaled.credit(tree)
        assert credit.groups == other.groups
        pivots = list(dict.fromkeys(tree.nodes[span.node].pivot for span in credit.spans))
        deviations = {
            pivot: np.std(group.rewards, ddof=1) + STD_EPSILON
            for pivot, group in zip(pivots, credit.groups, strict=True)
        }
        wanted = [span.advantage / deviations[tree.nodes[span.node].pivot] for span in credit.spans]
        assert [span.advantage for span in other.spans] == pytest.approx(wanted, abs=1e-9)


def test_the_others_are_told_apart() -> None:
    """Values along a tree do not sum to zero among siblings; else the list above would be too short."""
    for config in (c for c in ALL if not _compares_siblings(c)):
        grown = _grow(config, 0, "mixed", "any")
        sums = [
            sum(span.advantage for span in grown.strategy.credit(tree).spans if tree.nodes[span.node].pivot == pivot)
            for tree in grown.trees
            for pivot in range(len(tree.pivots))
        ]
        assert max(map(abs, sums)) > 1e-3


# ---------------------------------------------------------------- state


@every_strategy
@few
@worlds
def test_state_is_json_and_means_the_same_after_a_round_trip(
    config: dict[str, Any], seed: int, rewards: Rewards, lengths: Lengths
) -> None:
    strategy = _build(config)
    state = strategy.initial_state()
    for step in (1, 2):
        state = strategy.observe(state, _grow(config, seed, rewards, lengths, state=state, step=step).trees)
    stored = json.loads(json.dumps(state))
    assert strategy.report(stored) == strategy.report(state)
    assert all(isinstance(value, float) for value in strategy.report(state).values())
    kept, resumed = (_grow(config, seed, rewards, lengths, state=s, step=3).trees for s in (state, stored))
    assert kept == resumed
    assert json.dumps(strategy.observe(stored, resumed)) == json.dumps(strategy.observe(state, kept))


@every_strategy
def test_trees_of_every_strategy_survive_the_disk(config: dict[str, Any], tmp_path: Any) -> None:
    grown = _grow(config, 3, "mixed", "any")
    save_trees(tmp_path / "trees.jsonl.gz", grown.trees, [grown.strategy.credit(tree) for tree in grown.trees])
    assert tuple(load_trees(tmp_path / "trees.jsonl.gz")) == grown.trees


def test_every_registered_type_is_here() -> None:
    assert {config["type"] for config in ALL} == set(TYPES) >= {"root", "deep", "random", "treerl", "fr3e"}
    branching = [c for c in ALL if c["type"] != "root" and c.get("num_pivots") != 0]
    for config, seed in itertools.product(branching, [0]):
        # the worlds above do make every strategy branch
        assert any(len(tree.pivots) > 1 for tree in _grow(config, seed, "mixed", "any").trees)
