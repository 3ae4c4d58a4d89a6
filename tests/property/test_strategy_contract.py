"""The contract (explore/contract.py) for every strategy of ours, in toy worlds drawn by hypothesis.

A strategy that is added to `ExploreConfig` is tested here without further ado, with its defaults; a line in CONFIGS makes it
smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from deepgrpo.config import ExploreConfig, tables_of
from deepgrpo.credit.group import STD_EPSILON, Scale
from deepgrpo.explore import build_strategy
from deepgrpo.explore.base import Context, Strategy
from deepgrpo.explore.contract import (
    RULES,
    Rule,
    World,
    advantages_of_siblings_sum_to_zero,
    equal_rewards_train_nothing,
    grow_toy,
)
from deepgrpo.explore.toy import Letters, ToyTask
from deepgrpo.records import Tree
from deepgrpo.runs.trees import load_trees, save_trees

EXPLORE: TypeAdapter[Any] = TypeAdapter(ExploreConfig)
SEGMENTS = {"type": "tokens", "size": 3}

CONFIGS: dict[str, dict[str, Any]] = {
    "root": {"num_rollouts": 3},
    "deep": {"num_rollouts": 3, "num_pivots": 2, "branches_per_pivot": 3, "segments": SEGMENTS},
    "random": {"num_rollouts": 3, "num_pivots": 2, "branches_per_pivot": 3, "segments": SEGMENTS},
    "treerl": {"num_rollouts": 3, "num_rounds": 2},
    "fr3e": {"num_bases": 3, "num_anchors": 3, "rollouts_per_state": 3},
    "spo_tree": {"branching": [3, 2, 2], "segment_tokens": 4},
    "attnrl": {"num_rollouts": 4, "lag": 1, "segments": SEGMENTS},
    "adaptive": {"round_rollouts": 2, "max_rollouts": 7},
    "allocate": {"num_rollouts": 3, "branches_per_pivot": 3, "depth_bins": 2, "segments": SEGMENTS},
    "belief": {"cue": "#", "num_rollouts": 3, "num_pivots": 2, "branches_per_pivot": 3, "segments": SEGMENTS},
    "located": {"num_rollouts": 3, "branches_per_pivot": 3, "segments": SEGMENTS},
    "prefix": {"num_rollouts": 3, "branches_per_pivot": 3, "expand": "all", "segments": SEGMENTS},
    "oracle": {"num_rollouts": 4, "branches_per_pivot": 3},
}
TYPES = [
    model.model_fields["type"].default for model in tables_of(ExploreConfig) if model.model_fields["type"].default != "user"
]
"""A user's strategy has tests of its own: test_user_strategy.py."""
VARIANTS: list[dict[str, Any]] = [
    {"type": "deep", "expand": "all", "root_pivot": False},
    {"type": "deep", "num_pivots": 0},
    {"type": "deep", "expand": "unsolved", "max_ratio": 0.5, "recoverability": {"model": "bins"}},
    {"type": "adaptive", "min_successes": 2, "keep_rollouts": 3},
    {"type": "allocate", "root": False, "root_pivot": True, "tokens_per_prompt": 60.0},
    {"type": "allocate", "depth_bins": 0},
    {"type": "random", "expand": "all", "root_pivot": False},
    {"type": "located", "expand": "unsolved", "fallback": "none"},
    {"type": "located", "expand": "all", "fallback": "first", "root_pivot": False},
    {"type": "prefix", "expand": "failed", "per_prompt": 2, "store_tokens": 20, "max_age": 1},
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
    """Whether advantages are taken against siblings; else they are changes of value along the tree, or of a pooled group."""
    pooled = config["type"] == "adaptive" or (config["type"] == "allocate" and config.get("root", True))
    along = config["type"] in ("treerl", "attnrl") or (config["type"] == "spo_tree" and "advantage" not in config)
    return not along and not pooled


def _name(config: dict[str, Any]) -> str:
    """The type, and what a variant changes of its configuration above."""
    usual = CONFIGS.get(config["type"], {})
    changes = [f"{key}={value}" for key, value in config.items() if key != "type" and usual.get(key) != value]
    return "-".join([config["type"], *changes])


def _builder(config: dict[str, Any], scale: Scale = "none") -> Callable[[], Strategy]:
    section = EXPLORE.validate_python(config)
    return lambda: build_strategy(section, Context(scale, Letters(), ToyTask()))


every_strategy = pytest.mark.parametrize("config", ALL, ids=_name)
comparing = pytest.mark.parametrize("config", [c for c in ALL if _compares_siblings(c)], ids=_name)
worlds = given(
    st.builds(
        World, st.integers(0, 10_000), st.sampled_from(["mixed", "mixed", "graded", "all right", "all wrong"]),
        st.sampled_from(["any", "any", "one", "endless"]),
    )
)  # fmt: skip
few = examples(8)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.required], ids=lambda rule: rule.check.__name__)
@every_strategy
@few
@worlds
def test_a_strategy_keeps_the_contract(config: dict[str, Any], rule: Rule, world: World) -> None:
    rule.check(_builder(config), world)


@every_strategy
@few
@worlds
def test_equal_rewards_train_nothing(config: dict[str, Any], world: World) -> None:
    equal_rewards_train_nothing(_builder(config), world)
    grown = grow_toy(_builder(config), world)
    for credit in map(grown.strategy.credit, grown.trees):
        assert all(len(group.rewards) > 1 for group in credit.groups)
        assert world.rewards not in ("all right", "all wrong") or not any(group.mixed for group in credit.groups)


@comparing
@few
@worlds
def test_advantages_of_siblings_sum_to_zero(config: dict[str, Any], world: World) -> None:
    advantages_of_siblings_sum_to_zero(_builder(config), world)
    grown = grow_toy(_builder(config), world)
    for tree in grown.trees:
        credit = grown.strategy.credit(tree)
        siblings: dict[int, int] = {}
        for span in credit.spans:
            assert (span.start, span.end) == (0, len(tree.nodes[span.node].tokens))
            pivot = tree.nodes[span.node].pivot
            siblings[pivot] = siblings.get(pivot, 0) + 1
        assert siblings == {pivot: tree.pivots[pivot].num_branches for pivot in siblings}
        assert len(siblings) == len(credit.groups)


@comparing
@few
@worlds
def test_scale_divides_each_group_by_its_own_deviation(config: dict[str, Any], world: World) -> None:
    plain, scaled = _builder(config)(), _builder(config, "std")()
    for tree in grow_toy(_builder(config), world).trees:
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
    """Their advantages do not sum to zero among siblings; else the list above would be too short."""
    for config in (c for c in ALL if not _compares_siblings(c)):
        grown = [grow_toy(_builder(config), World(seed)) for seed in range(4)]
        sums = [
            sum(span.advantage for span in each.strategy.credit(tree).spans if tree.nodes[span.node].pivot == pivot)
            for each in grown
            for tree in each.trees
            for pivot in range(len(tree.pivots))
        ]
        assert max(map(abs, sums)) > 1e-3


@every_strategy
def test_trees_of_every_strategy_survive_the_disk(config: dict[str, Any], tmp_path: Path) -> None:
    strategy = _builder(config)()
    state = strategy.observe(strategy.initial_state(), grow_toy(_builder(config), World(3)).trees)
    grown = grow_toy(_builder(config), World(3), state=state, step=2)
    save_trees(tmp_path / "trees.jsonl.gz", grown.trees, [grown.strategy.credit(tree) for tree in grown.trees])
    assert tuple(load_trees(tmp_path / "trees.jsonl.gz")) == grown.trees


def test_every_registered_type_is_here() -> None:
    assert {config["type"] for config in ALL} == set(TYPES) >= {"root", "deep", "random", "treerl", "fr3e"}
    branching = [c for c in ALL if c["type"] != "root" and c.get("num_pivots") != 0]
    for config in branching:
        # the worlds above do make every strategy branch, at the latest when its prompts come again
        strategy = _builder(config)()
        trees: list[Tree] = []
        for seed in range(4):
            first = grow_toy(_builder(config), World(seed)).trees
            state = strategy.observe(strategy.initial_state(), first)
            trees += [*first, *grow_toy(_builder(config), World(seed), state=state, step=2).trees]
        assert any(len(tree.pivots) > 1 for tree in trees)
