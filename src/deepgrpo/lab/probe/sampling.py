"""Sampling of a probe: failed rollouts, and K continuations from several states of each.

    prompts ─► one rollout each ─► the failed ones ─► K continuations at the prompt and at one state per band of depth

Bands divide the depth ratio r of `explore/deep.py` into S equal parts, (0, 1/S] to (1 - 1/S, 1]. In every band with
candidates of a rollout, one of them is drawn uniformly to represent all: every rollout then has equal weight in a band, and
sums over all candidates can be estimated without bias (`MeasuredState.stands_for`). The prompt is measured too, as band 0.

With one rollout per prompt, failed rollouts are distributed as in training: harder questions occur more often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from deepgrpo import rng
from deepgrpo.engines.base import Engine, SamplingParams
from deepgrpo.errors import DataError
from deepgrpo.explore.base import Limits, State, Stateless, main_pivot
from deepgrpo.explore.grow import Judge, grow
from deepgrpo.explore.pivots import candidates
from deepgrpo.explore.segments import Segmenter
from deepgrpo.prompts.source import Cursor, PromptSource
from deepgrpo.records import Credit, Group, Pivot, Tree
from deepgrpo.runs.facts import depth_bin

FIRST_BATCH = 16
"""Prompts in the first batch, which refines the cost estimate."""

MIN_FAILED = 8
"""Minimum number of failed rollouts for any conclusion."""

BATCH_ROWS = 16
"""Continuations per batch, in multiples of the engine's rows: few rows idle at its end, and progress is reported often."""

HOPELESS = 0.95
"""Share of truncated responses above which a probe is pointless."""


@dataclass(frozen=True, slots=True)
class MeasuredState:
    """K continuations of one state of a failed rollout.

    Example: MeasuredState(band=3, ratio=0.4, offset=12, stands_for=2, rewards=(0.0, 1.0, ...), tokens=96, ...).
    """

    band: int
    """0 for the prompt, else 1..S."""
    ratio: float
    """Depth ratio r, with the root in the chain."""
    offset: int
    """Number of rollout tokens before the state."""
    stands_for: int
    """Number of the rollout's candidates in this band; 1 for the prompt."""
    rewards: tuple[float, ...]
    tokens: int
    """Sampled tokens of all K continuations."""
    successes: int

    @property
    def mixed(self) -> bool:
        """True if the group carries signal."""
        return Group("branch", self.rewards).mixed


@dataclass(frozen=True, slots=True)
class FailedRollout:
    """A rollout that DEEP-GRPO would expand, with its measured states."""

    prompt: str
    length: int
    truncated: bool
    ratios: tuple[float, ...]
    """Depths of all candidates, the prompt first."""
    states: tuple[MeasuredState, ...]
    """The prompt, then the other states in order of depth."""

    @property
    def deep(self) -> bool:
        """True if it has a state to branch at besides the prompt."""
        return len(self.states) > 1


@dataclass(slots=True)
class Sampled:
    """All samples so far, with counts."""

    failed: list[FailedRollout] = field(default_factory=list)
    rollouts: int = 0
    """Rollouts from prompts, including successes."""
    truncated: int = 0
    """Truncated rollouts."""
    rollout_tokens: int = 0
    tokens: int = 0
    """All sampled tokens, including continuations."""
    batches: int = 0
    seconds: float = 0.0
    """Seconds of sampling and scoring."""

    @property
    def failure_rate(self) -> float:
        return len(self.failed) / self.rollouts if self.rollouts else 0.0


@dataclass(frozen=True)
class ProbeStrategy(Stateless):
    """One rollout per prompt; if it failed, K continuations at the prompt and in every band of depth.

    Nothing is trained: `credit` exists only to satisfy the protocol.
    """

    segment: Segmenter
    branches: int
    bands: int
    success_threshold: float

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        if not tree.pivots:
            return [main_pivot(1)]
        if len(tree.pivots) > 1 or tree.nodes[0].outcome > self.success_threshold:
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

    def read(self, tree: Tree) -> FailedRollout | None:
        """The measurements in a grown tree; None if its rollout succeeded."""
        if len(tree.pivots) == 1:
            return None
        rollout, root = tree.nodes[0], tree.pivots[1]
        # the root's ratio is 1 / length of the chain; candidates are the first elements of the chain
        ratios = tuple((i + 1) * root.ratio for i in range(len(root.candidates)))
        bands = [band_of(ratio, self.bands) for ratio in ratios[1:]]
        states: list[MeasuredState] = []
        for number, pivot in enumerate(tree.pivots[1:], start=1):
            band = 0 if number == 1 else band_of(pivot.ratio, self.bands)
            nodes = [tree.nodes[child] for child in tree.children(number)]
            rewards = tuple(node.outcome for node in nodes)
            states.append(
                MeasuredState(
                    band, pivot.ratio, pivot.offset, bands.count(band) if band else 1, rewards,
                    tokens=sum(len(node.tokens) for node in nodes),
                    successes=sum(reward > self.success_threshold for reward in rewards),
                )
            )  # fmt: skip
        return FailedRollout(tree.prompt.id, len(rollout.tokens), rollout.finish == "length", ratios, tuple(states))


def band_of(ratio: float, bands: int) -> int:
    """The band 1..S with (band - 1) / S < ratio ≤ band / S, up to rounding.

    >>> [band_of(r, 4) for r in (0.1, 0.25, 0.26, 1.0)]
    [1, 1, 2, 4]
    """
    return depth_bin(ratio, bands) + 1


def draw_states(ratios: Sequence[float], bands: int, random: np.random.Generator) -> list[int]:
    """One index, drawn uniformly, from every non-empty band, ascending; the prompt (index 0) is left out."""
    members: dict[int, list[int]] = {}
    for index in range(1, len(ratios)):
        members.setdefault(band_of(ratios[index], bands), []).append(index)
    return [held[int(random.integers(len(held)))] for _, held in sorted(members.items())]


def sample_probe(
    source: PromptSource, strategy: ProbeStrategy, engine: Engine, judge: Judge, *,
    decode: Callable[[Sequence[int]], str], params: SamplingParams, limits: Limits, wanted: int, most_tokens: int,
    seed: int, max_rows: int, truncated_counts: bool, progress: Callable[[Sampled], None] = lambda sampled: None,
) -> Sampled:  # fmt: skip
    """Sample batch by batch until enough rollouts have failed, or further sampling is pointless.

    A batch is one `sample` call for its rollouts and one for all continuations, which reuse the stored prefixes. The size of
    the next batch follows from the failure rate so far; the last one may exceed `wanted`, and all its rollouts are used.

    Args:
        wanted: number of failed rollouts.
        most_tokens: no batch starts after this many sampled tokens.
        max_rows: sequences that the engine decodes at once; bounds the batch size.
        truncated_counts: True if truncated responses are scored like any other.
        progress: called with all samples after each batch.

    Ends early if none of 4 · `wanted` rollouts failed, or if no failed rollout has a state to branch at. Raises DataError if
    (nearly) all responses are cut off.
    """
    found, cursor, size = Sampled(), Cursor(), min(FIRST_BATCH, wanted)
    most_failed = max(FIRST_BATCH, BATCH_ROWS * max_rows // ((strategy.bands + 1) * strategy.branches))
    while len(found.failed) < wanted and found.tokens < most_tokens:
        prompts, cursor = source.take(cursor, size)
        growth = grow(
            prompts, strategy, strategy.initial_state(), engine, judge, decode=decode, params=params, limits=limits,
            # separate random stream: a training run with this seed samples other rollouts
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
                "failed unchecked (reward.truncated_value), so nothing can be rescued; raise --max-new-tokens (in a recipe "
                "sampling.max_new_tokens), or let them be scored: reward.truncated_value = \"none\""
            )
        if not found.failed and found.rollouts >= 4 * wanted:
            break
        if len(found.failed) >= MIN_FAILED and not any(each.deep for each in found.failed):
            break
        failing = (len(found.failed) + 1) / (found.rollouts + 2)
        size = max(1, min(math.ceil(min(wanted - len(found.failed), most_failed) / failing), 4 * max_rows))
        if not found.failed:
            size = min(size, 4 * wanted - found.rollouts)  # enough to conclude that none fails
    return found
