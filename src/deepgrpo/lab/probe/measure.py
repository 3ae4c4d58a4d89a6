"""The measurement: rounds of prompts, sampled and differentiated by every strategy with the same weights.

    a round:  prompts of the strategies ─► reference ─► each strategy      (same prompts, same draws)
              further prompts of the reference ─► reference

Rollouts from the prompt that strategies share are sampled and differentiated once. A strategy that learns a state between
steps, and has none from a run, first learns from one batch of further prompts, whose gradient is not measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepgrpo import rng
from deepgrpo.credit.group import NegativeRewardError
from deepgrpo.engines.base import named
from deepgrpo.errors import TrainingError
from deepgrpo.explore.grow import Growth, grow
from deepgrpo.foreign import unchanged_process
from deepgrpo.lab.probe.arms import Arm
from deepgrpo.lab.probe.estimate import PromptGradients
from deepgrpo.lab.probe.gradient import GradientMeter, PromptGradient
from deepgrpo.lab.probe.session import ArmParts, Session
from deepgrpo.ledger import Ledger
from deepgrpo.records import Credit, Prompt, Tree
from deepgrpo.runs.facts import depth_bin, is_mixed, succeeds
from deepgrpo.train.dynamic import has_signal
from deepgrpo.train.metrics import sampling_cost

DEPTHS = 4
"""Bins of the depth ratio in which pivots are counted."""


@dataclass(frozen=True)
class Plan:
    """Sizes of a probe. Example: Plan(prompts=48, reference=144, batch=8, seed=0)."""

    prompts: int
    """Prompts of the strategies, N."""
    reference: int
    """Prompts of the reference, M ≥ N."""
    batch: int
    """Prompts sampled at once."""
    seed: int

    @property
    def rounds(self) -> int:
        return math.ceil(self.prompts / self.batch)

    def share(self, number: int, total: int) -> int:
        """Prompts of a round when `total` are divided evenly over all rounds."""
        return total * (number + 1) // self.rounds - total * number // self.rounds


@dataclass
class ArmResult:
    """All that was measured of one strategy."""

    arm: Arm
    gradients: list[PromptGradient] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    """Sampled tokens of each prompt, as training would pay them."""
    branch_tokens: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    mixed: list[int] = field(default_factory=list)
    """Groups with unequal rewards."""
    signal: list[bool] = field(default_factory=list)
    """The prompt has an advantage."""
    rewards: list[float] = field(default_factory=list)
    """Mean reward of the rollouts from the prompt."""
    signal_tokens: int = 0
    """Tokens forwarded for the strategy's signals."""
    pivots: list[tuple[int, int, bool]] = field(default_factory=list)
    """Prompt and depth bin of each pivot, and whether a branch succeeded."""
    learned: bool = False
    """Its state was learned in the probe."""
    saved: bool = False
    """Its state is that of the run."""

    def add(
        self, trees: Sequence[Tree], credits: Sequence[Credit], gradients: Sequence[PromptGradient], threshold: float,
        asked: float = 0.0,
    ) -> None:  # fmt: skip
        """Add a batch.

        Args:
            threshold: outcomes above it are successes.
            asked: tokens per prompt that were sampled for nothing but the choice of pivots.
        """
        self.gradients += gradients
        for tree, credit in zip(trees, credits, strict=True):
            self.tokens.append(sum(node.num_sampled for node in tree.nodes) + asked)
            self.branch_tokens.append(sum(node.num_sampled for node in tree.nodes if node.stream == "branch"))
            self.groups.append(len(credit.groups))
            self.mixed.append(sum(is_mixed(group.rewards) for group in credit.groups))
            self.signal.append(has_signal(credit))
            main = [node.reward for _, node in tree.stream("main") if node.complete]
            self.rewards.append(float(np.mean(main)) if main else math.nan)
            self.pivots += [
                (len(self.tokens), depth_bin(pivot.ratio, DEPTHS), succeeds(tree, number, threshold))
                for number, pivot in enumerate(tree.pivots) if pivot.stream == "branch" and pivot.ratio > 0
            ]  # fmt: skip

    def as_gradients(self) -> PromptGradients:
        numerator_NSK = np.stack([each.numerator_SK for each in self.gradients])
        return PromptGradients(
            numerator_NSK.transpose(1, 0, 2), np.stack([each.denominator_S for each in self.gradients], axis=1),
            np.array(self.tokens, dtype=np.float64), merged=self.arm.config.loss.streams == "merged",
        )  # fmt: skip

    @property
    def step_prompts(self) -> float:
        """Prompts of a training step, those included that dynamic sampling replaces."""
        wanted, sampling = self.arm.step_prompts, self.arm.config.sampling
        if not sampling.dynamic:
            return float(wanted)
        return min(wanted / max(float(np.mean(self.signal)), 1e-9), float(wanted * sampling.max_rounds))


@dataclass
class Measured:
    """Results so far; prompts of all strategies are the same, in the same order."""

    plan: Plan
    arms: list[ArmResult]
    shared: list[np.ndarray] = field(default_factory=list)
    """`[K]` reference gradient of each prompt of the strategies."""
    further: list[np.ndarray] = field(default_factory=list)
    """`[K]` reference gradient of each further prompt."""
    measuring: Ledger = field(default_factory=Ledger)
    """Cost of the rounds; draws that strategies share count once."""
    learning: Ledger = field(default_factory=Ledger)
    """Cost of the batch from which strategies learn their state, before the first round."""
    prompts: list[str] = field(default_factory=list)
    """Ids of the strategies' prompts."""
    further_prompts: list[str] = field(default_factory=list)
    rounds: int = 0

    @property
    def spent(self) -> Ledger:
        return self.measuring + self.learning

    def pay(self, cost: Ledger) -> None:
        """Add to the cost of the rounds."""
        self.measuring += cost

    @property
    def count(self) -> int:
        return len(self.shared)

    def reference(self) -> np.ndarray:
        """`[M, K]` reference gradients, those of the strategies' prompts first."""
        return np.stack([*self.shared, *self.further])


Pay = Callable[[Ledger], None]
"""Adds a cost to that of the probe."""

Progress = Callable[[Measured, str], None]
"""Called with the results so far and the name of what was measured, after each strategy's part of a round."""


def measure(
    session: Session, arms: Sequence[Arm], reference: Arm, meter: GradientMeter, plan: Plan, *,
    into: Measured | None = None, progress: Progress = lambda found, what: None,
) -> Measured:  # fmt: skip
    """Measure all strategies.

    Args:
        into: receives every completed round, so that the results so far survive an interruption.

    Raises the errors of sampling, scoring and learning.
    """
    found = into or Measured(plan, [ArmResult(arm) for arm in arms])
    parts = [session.parts_of(arm) for arm in arms]
    truth = session.parts_of(reference)
    cursor = session.cursor
    for number in range(plan.rounds):
        own, cursor = session.prompts.take(cursor, plan.share(number, plan.prompts))
        further, cursor = session.prompts.take(cursor, plan.share(number, plan.reference - plan.prompts))
        with named(f"round {number + 1}"), unchanged_process():
            if number == 0:
                _learn(session, parts, found, (further or own)[: plan.batch], plan)
            batch: Any = []
            shared = _of_reference(session, truth, own, 2 * number, meter, plan, found.pay)
            progress(found, "the true gradient")
            for each, result in zip(parts, found.arms, strict=True):
                growth, credits = _sample(session, each, own, 2 * number, plan, found.pay)
                gradients = _differentiate(meter, each, growth.trees, credits, found.pay)
                batch.append((result, growth, credits, gradients))
                progress(found, each.arm.name)
            others = _of_reference(session, truth, further, 2 * number + 1, meter, plan, found.pay)
            progress(found, "the true gradient")
            session.engine.clear()
            meter.clear()
        for result, growth, credits, gradients in batch:
            # what is sampled to choose pivots is paid by all prompts alike
            asked = growth.signal_stats.sampled_tokens / len(growth.trees)
            result.add(growth.trees, credits, gradients, result.arm.config.explore.success_threshold, asked)
            result.signal_tokens += growth.signal_tokens
        found.shared += shared
        found.further += others
        found.prompts += [prompt.id for prompt in own]
        found.further_prompts += [prompt.id for prompt in further]
        found.rounds += 1
    return found


def _learn(session: Session, parts: Sequence[ArmParts], found: Measured, prompts: Sequence[Prompt], plan: Plan) -> None:
    """Let strategies whose state changes learn it from one batch, unless the run has it."""
    for each, result in zip(parts, found.arms, strict=True):
        result.saved = each.saved
        if each.saved or not each.strategy.initial_state():
            continue
        growth, _ = _sample(session, each, prompts, 1, plan, lambda cost: None)
        found.learning += sampling_cost(growth)
        each.state = each.strategy.observe(each.state, growth.trees)
        result.learned = True


def _of_reference(
    session: Session, truth: ArmParts, prompts: Sequence[Prompt], step: int, meter: GradientMeter, plan: Plan, pay: Pay
) -> list[np.ndarray]:
    """`[K]` gradient of each prompt; all its terms are of the main stream."""
    if not prompts:
        return []
    growth, credits = _sample(session, truth, prompts, step, plan, pay)
    found = _differentiate(meter, truth, growth.trees, credits, pay)
    return [each.numerator_SK[0] for each in found]


def _sample(
    session: Session, parts: ArmParts, prompts: Sequence[Prompt], step: int, plan: Plan, pay: Pay
) -> tuple[Growth, list[Credit]]:
    growth = grow(
        prompts, parts.strategy, parts.state, session.engine, parts.judge, decode=session.decode, params=parts.params,
        limits=session.limits, seed=rng.key(plan.seed, "probe"), step=step, signals=parts.signals,
        episodes=session.episodes,
    )  # fmt: skip
    pay(sampling_cost(growth))
    try:
        return growth, [parts.strategy.credit(tree) for tree in growth.trees]
    except NegativeRewardError as error:
        raise TrainingError(str(error)) from error


def _differentiate(
    meter: GradientMeter, parts: ArmParts, trees: Sequence[Tree], credits: Sequence[Credit], pay: Pay
) -> list[PromptGradient]:
    config = parts.arm.config
    began, tokens = time.perf_counter(), meter.tokens
    found = meter.measure(trees, credits, config, parts.objective, len(trees) / config.run.prompts_per_step)
    pay(Ledger(seconds_learn=time.perf_counter() - began, learner_tokens=meter.tokens - tokens))
    return found
