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

Points = Sequence[tuple[float, float]]
"""(x, y), x not descending."""


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


def value_at(points: Points, x: float) -> float | None:
    """Height of the curve at `x`, between the evaluations around it; None before the first or beyond the last one.

    Where several evaluations have the same x, the last one counts.
    """
    if not points or not points[0][0] <= x <= points[-1][0]:
        return None
    before = max(i for i, (x0, _) in enumerate(points) if x0 <= x)
    x0, y0 = points[before]
    if x0 == x:
        return y0
    x1, y1 = points[before + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def common_windows(curves: Sequence[Points], end: float) -> int:
    """The largest number of equal windows of [0, `end`) such that every curve has an evaluation in each; at least 1."""

    def filled(count: int) -> bool:
        return all(len({int(x * count / end) for x, _ in curve if x < end}) == count for curve in curves)

    most = min((sum(x < end for x, _ in curve) for curve in curves), default=1)
    return next((count for count in range(most, 1, -1) if filled(count)), 1)


def thinned(points: Points, windows: int, end: float) -> Points:
    """The first evaluation in each of the equal windows of [0, `end`), and the first one at or beyond `end`."""
    first: dict[int, tuple[float, float]] = {}
    for x, y in points:
        first.setdefault(min(windows, int(x * windows / end)), (x, y))
    return [first[window] for window in sorted(first)]


def first_reached(points: Points, target: float) -> float | None:
    """The x at which the curve reaches `target`, interpolated: the first crossing that the following evaluation confirms.

    None if there is none. A single evaluation above the target may be luck, as may be the last one, which nothing confirms.
    """
    for i in range(len(points) - 1):
        (x, y), (_, following) = points[i], points[i + 1]
        if y >= target and following >= target:
            if i == 0:
                return x
            x0, y0 = points[i - 1]
            return x if y0 >= target else x0 + (x - x0) * (target - y0) / (y - y0)
    return None
