"""Figures of every strategy with their intervals, and the differences between them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from deepgrpo.lab.probe.estimate import Reference, Replicates, figures, prompt_weights, spread
from deepgrpo.lab.probe.measure import ArmResult, Measured
from deepgrpo.stats import simultaneous_intervals


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """Figures of one strategy."""

    name: str
    step_prompts: float
    """Prompts of a training step."""
    tokens_per_prompt: float
    cos: Figure
    """Cosine of a step's gradient with the true gradient."""
    snr: Figure
    """snr² per 1,000 sampled tokens."""
    mixed: Figure
    """Mixed groups per 1,000 sampled tokens."""
    cos_main: float
    """Cosine of a step with the main stream alone."""
    cos_branch: float | None
    """Cosine of a step with the branch stream alone; None without branches."""
    norm_ratio: float | None
    """Norm of the branch stream's gradient in a step, divided by the main stream's."""
    branch_share: float
    """Share of the sampled tokens that are in branches."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Root of snr² per 1,000 tokens of `first` minus that of `second`; the intervals of all pairs hold together."""

    first: str
    second: str
    value: float
    low: float
    high: float

    @property
    def apart(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True)
class Findings:
    """All figures of a probe."""

    arms: tuple[ArmFigures, ...]
    differences: tuple[Difference, ...]
    agreement: float
    """Expected cosine of two halves of the reference."""
    truth_shown: bool
    """The true gradient is told from noise: |E y|² is above 0 in 97.5% of the replicates."""
    any_signal: bool
    """Some prompt has an advantage."""

    def between(self, first: str, second: str) -> Difference:
        """The difference of two strategies, in this order."""
        for each in self.differences:
            if (each.first, each.second) == (first, second):
                return each
            if (each.first, each.second) == (second, first):
                return Difference(first, second, -each.value, -each.high, -each.low)
        raise KeyError((first, second))


def analyse(measured: Measured) -> Findings:
    """Compute all figures."""
    gradient_MK = measured.reference()
    reference = Reference(gradient_MK)
    weight_RM = prompt_weights(measured.prompts, measured.further_prompts, measured.plan.seed)
    found: list[tuple[ArmFigures, Replicates]] = [
        _of_arm(result, reference, weight_RM) for result in measured.arms
    ]
    pairs = list(itertools.combinations(range(len(found)), 2))
    differences: list[Difference] = []
    if pairs:
        every_RF = np.stack([spread(found[i][1].root_R - found[j][1].root_R) for i, j in pairs], axis=1)
        low_F, high_F = simultaneous_intervals(every_RF[0], every_RF[1:])
        differences = [
            Difference(found[i][0].name, found[j][0].name, float(value), float(low), float(high))
            for (i, j), value, low, high in zip(pairs, every_RF[0], low_F, high_F, strict=True)
        ]
    return Findings(
        tuple(each for each, _ in found), tuple(differences), reference.agreement(),
        truth_shown=bool(np.quantile(spread(reference.truth(weight_RM))[1:], 0.025) > 0),
        any_signal=bool(np.any(gradient_MK)) or any(any(result.signal) for result in measured.arms),
    )  # fmt: skip


def _of_arm(result: ArmResult, reference: Reference, weight_RM: np.ndarray) -> tuple[ArmFigures, Replicates]:
    gradients, step = result.as_gradients(), result.step_prompts
    whole = figures(gradients, reference, weight_RM, step)
    weight_RN = weight_RM[:, : len(result.tokens)]
    mixed_R = 1000 * (weight_RN @ np.array(result.mixed)) / np.maximum(weight_RN @ np.array(result.tokens), 1e-9)
    main, branch = (figures(gradients.stream(s), reference, weight_RM[:1], step) for s in (0, 1))
    branches = bool(gradients.denominator_SN[1].any())
    ratio = float(np.sqrt(branch.power_R[0] / main.power_R[0])) if branches and main.power_R[0] > 0 else None
    return (
        ArmFigures(
            result.arm.name, step, float(whole.tokens_R[0]), _figure(whole.cos_R, -1.0, 1.0),
            _squared(_figure(whole.root_R)), _figure(mixed_R, 0.0),
            float(main.cos_R[0]), float(branch.cos_R[0]) if branches else None, ratio,
            sum(result.branch_tokens) / max(1, sum(result.tokens)),
        ),
        whole,
    )  # fmt: skip



def _figure(value_R: np.ndarray, lowest: float = -np.inf, highest: float = np.inf) -> Figure:
    """The first is the figure itself, the others are its replicates."""
    low, high = np.clip(np.quantile(spread(value_R)[1:], [0.025, 0.975]), lowest, highest)
    return Figure(float(value_R[0]), float(min(low, value_R[0])), float(max(high, value_R[0])))


def _squared(root: Figure) -> Figure:
    """Squares that keep their sign."""
    return Figure(*(float(np.sign(each) * each**2) for each in (root.value, root.low, root.high)))
