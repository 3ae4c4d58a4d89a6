"""Rules that every strategy keeps, tried in toy worlds without a model.

    for rule in RULES: rule.check(Subject(build), world)      raises BrokenRuleError with the reason

`deepgrpo doctor --strategy` runs them on a user's strategy; tests/property/test_strategy_contract.py runs them on ours.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepgrpo import rng
from deepgrpo.engines.base import SamplingParams
from deepgrpo.errors import DeepGRPOError
from deepgrpo.explore.base import Context, Limits, State, Strategy
from deepgrpo.explore.checks import BrokenRuleError, check_credit, check_metrics, check_pivots, check_state
from deepgrpo.explore.grow import Growth, grow
from deepgrpo.explore.toy import (
    FakeEngine,
    Lengths,
    Letters,
    Rewards,
    ToyTask,
    decode,
    make_judge,
    make_prompt,
    toy_signals,
)
from deepgrpo.pack.layout import lay_out
from deepgrpo.records import ROOT, Pivot, Prompt, Tree

LIMITS = Limits(max_new_tokens=16, max_total_tokens=24)
PROMPTS = (make_prompt("a", 3), make_prompt("b", 8), make_prompt("c", 15))
"""The last two leave room for 16 and 9 tokens."""
CONTEXT = Context(tokenizer=Letters(), task=ToyTask())
TOLERANCE = 1e-9

Build = Callable[[], Strategy]


@dataclass(frozen=True)
class World:
    """A seed, and the kind of rewards and lengths it gives."""

    seed: int = 0
    rewards: Rewards = "mixed"
    lengths: Lengths = "any"

    def __str__(self) -> str:
        lengths = {"any": "any length", "one": "one token each", "endless": "none ends"}[self.lengths]
        return f"seed {self.seed}, rewards {self.rewards}, responses: {lengths}"


_KINDS: list[tuple[Rewards, Lengths]] = [
    ("mixed", "any"), ("graded", "any"), ("all right", "any"), ("all wrong", "any"), ("mixed", "one"), ("mixed", "endless"),
]  # fmt: skip
WORLDS = tuple(World(seed, rewards, lengths) for seed in range(3) for rewards, lengths in _KINDS)


class Watched:
    """A strategy that records the round in which each pivot of a prompt was planned."""

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


@dataclass(frozen=True)
class Grown:
    """Trees of a world, with the strategy and the engine that grew them."""

    strategy: Watched
    engine: FakeEngine
    growth: Growth

    @property
    def trees(self) -> tuple[Tree, ...]:
        return self.growth.trees


def grow_toy(
    build: Build, world: World, *, prompts: Sequence[Prompt] = PROMPTS, state: State | None = None, step: int = 1
) -> Grown:
    """Trees of a step in a toy world, grown by the real loop."""
    strategy, engine = Watched(build()), FakeEngine(world.lengths)
    growth = grow(
        prompts, strategy, strategy.initial_state() if state is None else state, engine,
        make_judge(world.rewards, world.seed), decode=decode, params=SamplingParams(), limits=LIMITS, seed=world.seed,
        step=step, signals=toy_signals,
    )  # fmt: skip
    return Grown(strategy, engine, growth)


def bills_each_token_once(build: Build, world: World) -> None:
    grown = grow_toy(build, world)
    nodes = [node for tree in grown.trees for node in tree.nodes if node.sampled]
    tokens, billed = sum(len(node.tokens) for node in nodes), grown.growth.stats.sampled_tokens
    _require(tokens == billed, f"{billed} tokens were sampled, but the trees hold {tokens}")
    draws = grown.engine.keys
    _require(len(nodes) == len(draws) == len(set(draws)), f"{len(draws)} draws gave {len(nodes)} nodes")
    judged = sum(node.complete for node in nodes)
    _require(grown.growth.verifier_calls == judged, f"{judged} responses had {grown.growth.verifier_calls} verifier calls")
    _require(all(len(node.tokens) == len(node.logprobs) > 0 for node in nodes), "a node has no tokens")


def keeps_to_the_limits(build: Build, world: World) -> None:
    for tree in grow_toy(build, world).trees:
        room = LIMITS.response(tree)
        _require(bool(tree.pivots) and tree.pivots[0].parent == ROOT, "the first pivot is not the prompt")
        for index, node in enumerate(tree.nodes):
            if not node.sampled:
                continue
            length, pivot = len(tree.response(index)), tree.pivots[node.pivot]
            _require(length <= room, f"node {index} ends a response of {length} tokens; the limit is {room}")
            placed = (node.parent, node.offset, node.stream) == (pivot.parent, pivot.offset, pivot.stream)
            _require(placed, f"node {index} is not where its pivot is")
        check_pivots(tree.pivots, tree, LIMITS)
        for number, pivot in enumerate(tree.pivots):
            children, name = tree.children(number), f"pivot {number}"
            complete = len(children) == pivot.num_branches
            _require(complete, f"{name} has {len(children)} of {pivot.num_branches} continuations")
            _require(pivot.parent < min(children), f"{name} comes before its parent")


def returns_only_where_announced(build: Build, world: World) -> None:
    grown = grow_toy(build, world)
    strategy, rounds = grown.strategy, range(len(grown.engine.kept))
    _require(grown.engine.kept == [strategy.returns(level) for level in rounds], "returns(level) changes its answer")
    for place, tree in enumerate(grown.trees):
        levels = strategy.levels[tree.prompt.id]
        _require(len(levels) == len(tree.pivots), "a planned pivot is not in the tree")
        for pivot in tree.pivots:
            parent = _sampled_parent(tree, pivot)
            level = 0 if parent == ROOT else levels[tree.nodes[parent].pivot]
            announced = parent == ROOT or strategy.returns(level)
            _require(announced, f"a pivot goes on from round {level}, but returns({level}) is False")
        # ask again with the last address that grow used
        random = rng.generator(world.seed, 1, place, tree.prompt.id, "plan", levels[-1] + 1)
        again = strategy.strategy.plan(tree, strategy.initial_state(), LIMITS, random)
        _require(again == [], f"asked again about a complete tree, plan returns {len(again)} pivots")


def _sampled_parent(tree: Tree, pivot: Pivot) -> int:
    """Node of this step that a pivot goes on from, past given ones; ROOT if there is none."""
    parent = pivot.parent
    while parent != ROOT and not tree.nodes[parent].sampled:
        parent = tree.nodes[parent].parent
    return parent


def same_seed_same_tree(build: Build, world: World) -> None:
    first = grow_toy(build, world).trees
    _require(grow_toy(build, world).trees == first, "the same seed grew two different trees; draw from `random` only")
    others = [make_prompt("x", 5), PROMPTS[1], make_prompt("y", 2), make_prompt("z", 3)]
    among = grow_toy(build, world, prompts=others).trees[1]
    _require(among == first[1], "a tree depends on the other prompts of its batch; use only the tree, the state and `random`")
    alone = grow_toy(build, world, prompts=PROMPTS[:1]).trees[0]
    _require(alone == first[0], "a tree depends on the size of its batch; use only the tree, the state and `random`")


def trains_no_token_twice(build: Build, world: World) -> None:
    grown = grow_toy(build, world)
    credits = [check_credit(grown.strategy.credit(tree), tree) for tree in grown.trees]
    _require(credits == [grown.strategy.credit(tree) for tree in grown.trees], "the same tree got two different credits")
    _require(all(credit.groups for credit in credits), "a tree has no group of siblings; metrics are computed from them")
    terms = sum(span.end - span.start for credit in credits for span in credit.spans)
    laid_out = len(lay_out(grown.trees, credits).terms)  # the learner's view
    _require(terms == laid_out, f"credit has {terms} tokens, but {laid_out} would be trained")


def state_survives_a_checkpoint(build: Build, world: World) -> None:
    strategy = build()
    state = strategy.initial_state()
    for step in (1, 2):
        trees = grow_toy(build, world, state=state, step=step).trees
        before = copy.deepcopy(state)
        following = strategy.observe(state, trees)
        _require(state == before, "observe changes the state that it is given; return a new one")
        state = following
    stored = check_state(dict(state), "observe")  # as a checkpoint gives it back
    _require(check_metrics(strategy.report(stored)) == strategy.report(state), "report differs after a round trip through JSON")
    kept, resumed = (grow_toy(build, world, state=each, step=3).trees for each in (state, stored))
    _require(kept == resumed, "a resumed run grows other trees than an uninterrupted one")
    last = [json.dumps(strategy.observe(*pair)) for pair in ((stored, resumed), (state, kept))]
    _require(last[0] == last[1], "a resumed run learns another state than an uninterrupted one")


def equal_rewards_train_nothing(build: Build, world: World) -> None:
    if world.rewards not in ("all right", "all wrong"):
        return
    grown = grow_toy(build, world)
    for tree in grown.trees:
        for span in grown.strategy.credit(tree).spans:
            _require(
                abs(span.advantage) < TOLERANCE,
                f"all responses have the same reward, but a token has the advantage {span.advantage:.3g}",
            )


def advantages_of_siblings_sum_to_zero(build: Build, world: World) -> None:
    grown = grow_toy(build, world)
    for tree in grown.trees:
        sums: dict[int, float] = {}
        for span in grown.strategy.credit(tree).spans:
            pivot = tree.nodes[span.node].pivot
            sums[pivot] = sums.get(pivot, 0.0) + span.advantage
        for pivot, total in sums.items():
            _require(abs(total) < TOLERANCE, f"the advantages at pivot {pivot} sum to {total:.3g}")


@dataclass(frozen=True)
class Rule:
    """One property of a strategy, and whether every strategy must have it."""

    name: str
    check: Callable[[Build, World], None]
    required: bool = True


RULES = (
    Rule("every sampled token is in one node and billed once", bills_each_token_once),
    Rule("trees keep to the limits and branch where there is room", keeps_to_the_limits),
    Rule("growth ends, and later rounds return only to announced ones", returns_only_where_announced),
    Rule("same seed, same tree, whatever else is in the batch", same_seed_same_tree),
    Rule("credit stays inside nodes and trains no token twice", trains_no_token_twice),
    Rule("state is plain JSON, and a resumed run equals an uninterrupted one", state_survives_a_checkpoint),
    Rule("equal rewards train nothing", equal_rewards_train_nothing, required=False),
    Rule("advantages of siblings sum to zero", advantages_of_siblings_sum_to_zero, required=False),
)
"""Those that are not required hold for a baseline by group mean; a strategy may have another one."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of a rule: None, or the reason and the world in which it fails."""

    rule: Rule
    reason: str | None
    world: World | None = None


def run_contract(build: Build, worlds: Sequence[World] = WORLDS) -> list[Verdict]:
    """Try each rule in every world; stop a rule at its first failure."""
    return [_verdict(rule, build, worlds) for rule in RULES]


def _verdict(rule: Rule, build: Build, worlds: Sequence[World]) -> Verdict:
    for world in worlds:
        try:
            rule.check(build, world)
        except (BrokenRuleError, DeepGRPOError) as error:
            return Verdict(rule, str(error), world)
    return Verdict(rule, None)


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise BrokenRuleError(reason)
