"""What a probe samples: failed rollouts, and K continuations at some states of each.

    prompts ─► one rollout each ─► the failed ones ─► K continuations at the prompt and at one state per band of depth

Bands cut the depth ratio r of `explore/deep.py` into S equal parts, (0, 1/S] to (1 - 1/S, 1]. In every band that holds
candidates of a rollout one of them is drawn uniformly and stands for all: so every rollout weighs the same in a band, and
sums over all candidates can be estimated without bias (`State.stands_for`). The prompt is measured besides, as band 0.

One rollout per prompt makes the failed rollouts those of the training: questions that fail more often come more often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from deepgrpo import rng
from deepgrpo.engines.base import Engine, SamplingParams
from deepgrpo.errors import DataError
from deepgrpo.explore.base import Limits, Signal, State, main_pivot
from deepgrpo.explore.grow import Judge, grow
from deepgrpo.explore.pivots import candidates
from deepgrpo.explore.segments import Segmenter
from deepgrpo.prompts.source import Cursor, PromptSource
from deepgrpo.records import Credit, Group, Pivot, Tree
from deepgrpo.runs.facts import depth_bin

FIRST_BATCH = 16
"""Prompts of the first batch, from which the cost is estimated anew."""

MIN_FAILED = 8
"""Fewer failed rollouts than this say nothing."""

BATCH_ROWS = 16
"""Continuations in a batch, in multiples of what the engine decodes at once: few rows are idle at its end, and there is
something to tell now and then."""

HOPELESS = 0.95
"""Share of responses cut off from which on nothing is learned but that they are."""


@dataclass(frozen=True, slots=True)
class MeasuredState:
    """K continuations of one state of a failed rollout.

    Example: MeasuredState(band=3, ratio=0.4, offset=12, stands_for=2, rewards=(0.0, 1.0, ...), tokens=96, ...).
    """

    band: int
    """0: the prompt; else 1..S."""
    ratio: float
    """Depth r, the root counted."""
    offset: int
    """Tokens of the rollout before the state."""
    stands_for: int
    """Candidates of the rollout in this band; 1 for the prompt."""
    rewards: tuple[float, ...]
    tokens: int
    """Sampled for the K continuations together."""
    successes: int

    @property
    def mixed(self) -> bool:
        """Whether the group would carry signal."""
        return Group("branch", self.rewards).mixed


@dataclass(frozen=True, slots=True)
class FailedRollout:
    """A rollout that DEEP-GRPO would expand, with what was measured in it."""

    prompt: str
    length: int
    truncated: bool
    ratios: tuple[float, ...]
    """Depths of all states that may become pivots, the prompt among them (first)."""
    states: tuple[MeasuredState, ...]
    """The prompt first, then deeper and deeper."""

    @property
    def deep(self) -> bool:
        """Whether it has a state to branch at beside the prompt."""
        return len(self.states) > 1


@dataclass(slots=True)
class Sampled:
    """Everything that was sampled."""

    failed: list[FailedRollout] = field(default_factory=list)
    rollouts: int = 0
    """From the prompts, successes included."""
    truncated: int = 0
    """Of these."""
    rollout_tokens: int = 0
    tokens: int = 0
    """All of them, continuations included."""
    batches: int = 0
    seconds: float = 0.0
    """Sampling and scoring."""

    @property
    def failure_rate(self) -> float:
        return len(self.failed) / self.rollouts if self.rollouts else 0.0


@dataclass(frozen=True)
class ProbeStrategy:
    """One rollout per prompt; if it failed, K continuations at the prompt and in every band of depth.

    It learns nothing and is never trained with: `credit` and `observe` are there for the protocol.
    """

    segment: Segmenter
    branches: int
    bands: int
    success_threshold: float
    signals: frozenset[Signal] = frozenset()

    def initial_state(self) -> State:
        return {}

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        if not tree.pivots:
            return [main_pivot(1)]
        if len(tree.pivots) > 1 or tree.nodes[0].reward > self.success_threshold:
            return []
        offsets, ratios = candidates(self.segment(tree.nodes[0].tokens), room=limits.response(tree))
        chosen = [0, *draw_states(ratios, self.bands, random)]
        return [
            Pivot(parent=0, offset=offsets[i], num_branches=self.branches, ratio=ratios[i], candidates=tuple(offsets))
            for i in chosen
        ]

    def returns(self, level: int) -> bool:
        return level == 0

    def credit(self, tree: Tree) -> Credit:
        return Credit((), ())

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        return state

    def report(self, state: State) -> dict[str, float]:
        return {}

    def read(self, tree: Tree) -> FailedRollout | None:
        """What a grown tree says; None if its rollout succeeded."""
        if len(tree.pivots) == 1:
            return None
        rollout, root = tree.nodes[0], tree.pivots[1]
        # the root's ratio is 1 / length of the chain, and candidates are its first elements
        ratios = tuple((i + 1) * root.ratio for i in range(len(root.candidates)))
        bands = [band_of(ratio, self.bands) for ratio in ratios[1:]]
        states: list[MeasuredState] = []
        for number, pivot in enumerate(tree.pivots[1:], start=1):
            band = 0 if number == 1 else band_of(pivot.ratio, self.bands)
            nodes = [tree.nodes[child] for child in tree.children(number)]
            rewards = tuple(node.reward for node in nodes)
            states.append(
                MeasuredState(
                    band, pivot.ratio, pivot.offset, bands.count(band) if band else 1, rewards,
                    tokens=sum(len(node.tokens) for node in nodes),
                    successes=sum(reward > self.success_threshold for reward in rewards),
                )
            )  # fmt: skip
        return FailedRollout(tree.prompt.id, len(rollout.tokens), rollout.finish == "length", ratios, tuple(states))


def band_of(ratio: float, bands: int) -> int:
    """The band 1..S with (band - 1) / S < ratio ≤ band / S; rounding errors aside.

    >>> [band_of(r, 4) for r in (0.1, 0.25, 0.26, 1.0)]
    [1, 1, 2, 4]
    """
    return depth_bin(ratio, bands) + 1


def draw_states(ratios: Sequence[float], bands: int, random: np.random.Generator) -> list[int]:
    """One index, drawn uniformly, from every band that holds one; the prompt (index 0) is left out. Ascending."""
    members: dict[int, list[int]] = {}
    for index in range(1, len(ratios)):
        members.setdefault(band_of(ratios[index], bands), []).append(index)
    return [held[int(random.integers(len(held)))] for _, held in sorted(members.items())]


def gather(
    source: PromptSource, strategy: ProbeStrategy, engine: Engine, judge: Judge, *,
    decode: Callable[[Sequence[int]], str], params: SamplingParams, limits: Limits, wanted: int, most_tokens: int,
    seed: int, max_rows: int, truncated_counts: bool, progress: Callable[[Sampled], None] = lambda sampled: None,
) -> Sampled:  # fmt: skip
    """Sample batch by batch until enough rollouts have failed, or nothing is to be hoped for.

    A batch is one `sample` call for its rollouts and one for all continuations, which start from the kept keys. The size of
    the next one follows from the share that failed so far; the last may bring a few more than wanted, and all are used.

    Args:
        wanted: failed rollouts.
        most_tokens: no batch begins once so many have been sampled.
        max_rows: sequences that the engine decodes at once; it bounds a batch.
        truncated_counts: whether a response that was cut off is scored like any other.
        progress: told what there is after each batch.

    Ends early, with what there is, if none of 4 · `wanted` rollouts failed, or none of the failed ones has a state to branch
    at. Raises DataError if (nearly) all responses are cut off.
    """
    found, cursor, size = Sampled(), Cursor(), min(FIRST_BATCH, wanted)
    most_failed = max(FIRST_BATCH, BATCH_ROWS * max_rows // ((strategy.bands + 1) * strategy.branches))
    while len(found.failed) < wanted and found.tokens < most_tokens:
        prompts, cursor = source.take(cursor, size)
        growth = grow(
            prompts, strategy, strategy.initial_state(), engine, judge, decode=decode, params=params, limits=limits,
            # draws of its own: a training run with this seed meets other rollouts
            seed=rng.key(seed, "probe"), step=found.batches,
        )  # fmt: skip
        for tree in growth.trees:
            read = strategy.read(tree)
            found.failed += [read] if read is not None else []
            found.truncated += tree.nodes[0].finish == "length"
            found.rollout_tokens += len(tree.nodes[0].tokens)
        found.rollouts += len(growth.trees)
        found.batches += 1
        found.tokens += growth.stats.sampled_tokens
        found.seconds += growth.stats.seconds + growth.seconds_reward
        progress(found)
        if not truncated_counts and found.rollouts >= MIN_FAILED and found.truncated >= HOPELESS * found.rollouts:
            raise DataError(
                f"{found.truncated} of {found.rollouts} responses were cut off at {limits.max_new_tokens} tokens and count as "
                "failed unseen (reward.truncated_value), so nothing can be rescued; raise --max-new-tokens (in a recipe "
                "sampling.max_new_tokens), or let them be scored: reward.truncated_value = \"none\""
            )
        if not found.failed and found.rollouts >= 4 * wanted:
            break
        if len(found.failed) >= MIN_FAILED and not any(each.deep for each in found.failed):
            break
        failing = (len(found.failed) + 1) / (found.rollouts + 2)
        size = max(1, min(math.ceil(min(wanted - len(found.failed), most_failed) / failing), 4 * max_rows))
        if not found.failed:
            size = min(size, 4 * wanted - found.rollouts)  # enough to say that none fails
    return found
