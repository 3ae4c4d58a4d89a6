"""Summaries of a learning curve: area, first crossing of a target, mean of the last evaluations. No torch.

A curve is a list of evaluations (x, y), x ascending, where x counts sampled tokens or optimizer steps and y is an accuracy.
Between two evaluations it is a straight line.

Worked example: evaluations at 0, 100 and 300 tokens with accuracies .2, .4 and .8.
    area up to 300    (100 · .3 + 200 · .6) / 300 = .5      up to 200    (100 · .3 + 100 · .5) / 200 = .4
    reaches .6        at 200, half way between the last two
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]
"""(x, y), x not descending."""


@dataclass(frozen=True, slots=True)
class TailMean:
    """Mean of the last evaluations. Example: TailMean(mean=0.64, count=10)."""

    mean: float
    count: int
    """Evaluations in the mean; fewer than requested if the curve is shorter."""


def area(points: Points, end: float) -> float | None:
    """Mean height of the curve from 0 to `end`."""
    return mean_height(points, 0.0, end)


def mean_height(points: Points, start: float, end: float) -> float | None:
    """Mean height of the curve from `start` to `end`: trapezoids, divided by the width.

    None if the curve begins later or ends earlier: extrapolation would look like a measurement.
    """
    if not points or end <= start or points[0][0] > start or points[-1][0] < end:
        return None
    total = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x1 <= start or x0 >= end or x0 == x1:
            continue
        slope, left, right = (y1 - y0) / (x1 - x0), max(x0, start), min(x1, end)
        total += (right - left) * (y0 + slope * ((left + right) / 2.0 - x0))
    return total / (end - start)


def first_crossing(points: Points, target: float) -> float | None:
    """The x at which the curve first reaches `target`, interpolated between evaluations; None if it never does.

    The first crossing of a noisy curve is biased towards early, equally for every arm.
    """
    before: tuple[float, float] | None = None
    for x, y in points:
        if y >= target:
            if before is None:
                return x
            x0, y0 = before
            return x0 + (x - x0) * (target - y0) / (y - y0)
        before = (x, y)
    return None


def tail_mean(points: Points, *, last: int | None, share: float | None, end: float) -> TailMean | None:
    """Mean of the last evaluations of a curve, without the one before training.

    Args:
        last: number of evaluations to average; or
        share: average those in the last part of [0, `end`], such as 0.2 (exactly one of the two is given).
        end: nominal end of the curve. Evaluations beyond it, made after a last step that overshot, are included unless the
            caller cuts the curve.

    None if there is no evaluation to average.
    """
    assert (last is None) != (share is None)
    after = [(x, y) for x, y in points if x > 0]
    chosen = after[-last:] if last is not None else [(x, y) for x, y in after if x >= (1.0 - (share or 0.0)) * end]
    return TailMean(sum(y for _, y in chosen) / len(chosen), len(chosen)) if chosen else None
