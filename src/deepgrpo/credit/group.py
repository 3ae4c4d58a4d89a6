"""Compare siblings: rewards of one group become advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

STD_EPSILON = 1e-4
"""Added to the standard deviation, as TRL does; it bounds the advantage of a nearly unanimous group."""


def centre(rewards: Sequence[float], scale: Literal["none", "std"] = "none") -> np.ndarray:
    """Centre rewards within a group. `A_i = r_i - mean(r)`; Dr. GRPO (arXiv:2503.20783), DEEP-GRPO's own choice.

    Args:
        rewards: `[N]`, one per sibling, unscaled.
        scale: "std" also divides by the sample standard deviation (N - 1) plus 1e-4; GRPO (arXiv:2402.03300).

    Returns:
        `[N]` float64, sums to 0; all exactly zero when the siblings agree.

    Raises:
        ValueError: fewer than two siblings, which leaves nothing to compare with.
    """
    if len(rewards) < 2:
        raise ValueError(f"a group has {len(rewards)} rollout, but a baseline needs at least 2")
    values = np.asarray(rewards, dtype=np.float64)
    if values.max() == values.min():
        return np.zeros_like(values)  # the mean of equal floats need not be that float
    advantages: np.ndarray = values - values.mean()
    return advantages / (values.std(ddof=1) + STD_EPSILON) if scale == "std" else advantages
