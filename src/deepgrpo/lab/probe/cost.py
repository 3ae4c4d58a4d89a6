"""Cost of a probe beside one training step, measured or forecast."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from deepgrpo.lab.probe.arms import Arm
from deepgrpo.lab.probe.measure import ArmResult, Measured
from deepgrpo.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Cost:
    """Example: Cost("deep", 8, 3900.0, 33.0, 52310, 380.0): a probe of 13 steps' tokens."""

    strategy: str
    """The strategy of the training step."""
    step_prompts: int
    step_tokens: float
    """Sampled tokens of one training step."""
    step_seconds: float
    """Its sampling, rewards and backward passes at the speed of the probe; without the optimizer and evaluations."""
    tokens: int
    """Sampled tokens of the probe; draws that strategies share count once."""
    seconds: float

    def sentence(self, verb: str = "cost") -> str:
        ratio = ""
        if self.step_tokens and self.step_seconds:
            tokens, seconds = self.tokens / self.step_tokens, self.seconds / self.step_seconds
            ratio = f": as much as {tokens:.1f} steps in tokens, {seconds:.1f} in seconds"
        return (
            f"{verb}: {self.tokens:,} sampled tokens, {duration(self.seconds)}; one training step ({self.strategy}, "
            f"{self.step_prompts} prompts): about {self.step_tokens:,.0f} tokens, {duration(self.step_seconds)}{ratio}"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cost_of(measured: Measured, own: Arm, spent: Ledger | None = None) -> Cost:
    """The cost so far beside a training step.

    Args:
        own: the recipe's own strategy; if it was not measured, the first one stands for it.
        spent: another cost, such as a forecast.
    """
    spent = spent or measured.spent
    result = next((each for each in measured.arms if each.arm.config.explore == own.config.explore), measured.arms[0])
    return Cost(
        result.arm.name, result.arm.step_prompts, *_step(measured, result),
        spent.sampled_tokens, spent.seconds,
    )  # fmt: skip


def _step(measured: Measured, result: ArmResult) -> tuple[float, float]:
    """Sampled tokens and seconds of a training step."""
    if not result.tokens:
        return 0.0, 0.0
    spent, prompts = measured.spent, result.step_prompts
    tokens = prompts * sum(result.tokens) / len(result.tokens)
    forwarded = prompts * sum(each.tokens for each in result.gradients) / len(result.tokens)
    sampling = (spent.seconds_sample + spent.seconds_reward + spent.seconds_signals) / max(1, spent.sampled_tokens)
    learning = spent.seconds_learn / max(1, spent.learner_tokens)
    return tokens, tokens * sampling + forwarded * learning


def duration(seconds: float) -> str:
    """Seconds, or minutes from two of them on: "8.5 s", "61 s", "3 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
