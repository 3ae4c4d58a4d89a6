"""Rewards of a sibling group → advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

Scale = Literal["none", "std", "mean", "part_std"]
"""Divisor of centred rewards, `credit.scale`."""

STD_EPSILON = 1e-4
"""Added to the standard deviation, as TRL does; it bounds the advantage of a nearly unanimous group."""


class NegativeRewardError(ValueError):
    """A reward below zero in a group that is scaled by its mean."""


def centre(rewards: Sequence[float], scale: Scale = "none") -> np.ndarray:
    """Centre rewards within a group. `A_i = r_i - mean(r)`; Dr. GRPO (arXiv:2503.20783), DEEP-GRPO's own choice.

    Scales:
        std: `A_i / (std(r) + 1e-4)`, the sample standard deviation (N - 1); GRPO (arXiv:2402.03300).
        part_std: as std; of a reward with parts, each part by itself (`centre_parts`).
        mean: `A_i / mean(r)`; MaxRL (arXiv:2602.02710). With K successes among N rewards of 0 and 1, a success gets
            (N - K) / K and a failure -1, so rare successes weigh more. Bounded by -1 and N - 1.

    Args:
        rewards: `[N]`, one per sibling, unscaled; with "mean" at least 0.

    Returns:
        `[N]` float64, sums to 0; all exactly zero when the siblings agree, also where all rewards are 0.

    Raises:
        ValueError: fewer than two siblings, which leaves nothing to compare with.
        NegativeRewardError: a reward below 0 with "mean": dividing by a mean below 0 would turn the best into the worst.
    """
    if len(rewards) < 2:
        raise ValueError(f"a group has {len(rewards)} rollout, but a baseline needs at least 2")
    values = np.asarray(rewards, dtype=np.float64)
    if scale == "mean" and values.min() < 0:
        raise NegativeRewardError(
            f'credit.scale is "mean", but a group has the reward {values.min():g}: it divides by the mean reward, which must '
            'not be negative; use rewards of at least 0, or set credit.scale = "none"'
        )
    if values.max() == values.min():
        return np.zeros_like(values)  # the mean of equal floats need not be that float
    if scale == "mean":
        # a common power of two cancels out exactly; without it, the mean of the smallest floats rounds to 0
        values = np.ldexp(values, -np.frexp(values.max())[1])
    divisor = {"none": 1.0, "mean": values.mean()}.get(scale, values.std(ddof=1) + STD_EPSILON)
    advantages: np.ndarray = (values - values.mean()) / divisor
    return advantages


def centre_parts(parts: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> np.ndarray:
    """Normalise each part of a reward within its group, then add. `A_i = Σ_k w_k · (r_ik - mean(r_k)) / (std(r_k) + 1e-4)`.

    GDPO (arXiv:2601.05242): the standard deviation of a sum would let the part that varies most decide alone, and responses
    with different parts and equal sums could not be told apart. A part on which the siblings agree adds nothing.

    Args:
        parts: name → `[N]` values, one per sibling, before the weight.
        weights: of each part.

    Returns:
        `[N]` float64, sums to 0.

    Raises ValueError: fewer than two siblings.
    """
    advantages: np.ndarray = np.sum([weights[name] * centre(values, "std") for name, values in parts.items()], axis=0)
    return advantages
