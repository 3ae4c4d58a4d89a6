"""Intervals for what was counted in clusters: proportions, and ratios that may be compared with each other.

A cluster is a prompt. Rollouts of one prompt, and continuations of one rollout, are alike; taken for independent they would
make every interval too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of one value per prompt: `sqrt(sum (v - mean)^2 / (n (n-1)))`.

    The unit is the prompt: with several samples per prompt pass the prompts' means, as samples of one prompt are not
    independent. It says how the figure would vary over other prompts of the same kind, not over seeds of the training.

    Returns 0 for a single value. Raises ValueError for none.
    """
    n = len(values)
    if n == 0:
        raise ValueError("the standard error of no values is not defined")
    if n == 1:
        return 0.0
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n * (n - 1)))


def wilson_interval(successes: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a success rate; unlike mean ± z·se it stays inside [0, 1] and works at 0 and n.

    `(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)` with p = successes / n; Wilson 1927.

    Args:
        successes: number of successes, 0..n.
        n: number of trials, at least 1.
        z: normal quantile; the default covers 95%.

    Raises:
        ValueError: n < 1, or successes out of range.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a success rate needs n >= 1 and 0 <= successes <= n, but successes = {successes}, n = {n}")
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


@dataclass(frozen=True, slots=True)
class Proportion:
    """A share with its 95% interval. Example: Proportion(rate=0.8, low=0.490, high=0.943, trials=10, clusters=10)."""

    rate: float
    low: float
    high: float
    trials: int
    clusters: int


def clustered_proportion(successes: Sequence[float] | np.ndarray, trials: Sequence[int] | np.ndarray) -> Proportion:
    """Share of successes with a Wilson interval over the number of trials that the clusters are worth.

    `p = Σ s_c / Σ n_c`, `deff = max(1, v / v0)` with `v = C/(C-1) Σ (s_c - p n_c)² / n²` (the variance of a ratio between
    clusters) and `v0 = p (1-p) / (n-1)` (that of n independent trials); Wilson's interval is taken at `n / deff` trials
    (Korn and Graubard 1998 do the same with another interval). If all trials or none succeed, v says nothing: then a cluster
    counts as one trial.

    Args:
        successes, trials: `[C]` per cluster, with 0 ≤ s_c ≤ n_c and n_c ≥ 1.

    With clusters of one trial each it is Wilson's interval as it stands: 8 of 10 give [0.490, 0.943].
    Raises ValueError: no cluster, or a count out of range.
    """
    s, n = np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    if len(s) == 0 or len(s) != len(n) or (n < 1).any() or (s < 0).any() or (s > n).any():
        raise ValueError(f"a proportion needs clusters with 0 <= successes <= trials >= 1, got {successes!r} of {trials!r}")
    count, total = len(s), float(n.sum())
    p = float(s.sum()) / total
    worth = float(count)
    if count > 1 and 0 < p < 1:
        between = count / (count - 1) * float(np.sum((s - p * n) ** 2)) / total**2
        worth = total / max(1.0, between / (p * (1 - p) / (total - 1)))
    # the formula wants whole trials: rounding down errs on the wide side
    effective = max(1, math.floor(worth + 1e-9))
    low, high = wilson_interval(p * effective, effective)
    return Proportion(p, low, high, int(total), count)


def cluster_weights(clusters: Sequence[str], replicates: int, random: np.random.Generator) -> np.ndarray:
    """How often each item stands in each bootstrap replicate, whole clusters drawn with replacement: `[replicates, N]` ints.

    Args:
        clusters: `[N]` the cluster of each item.
    """
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    drawn = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=replicates)
    weights: np.ndarray = drawn[:, member.reshape(-1)]
    return weights


def simultaneous_intervals(
    points: np.ndarray, replicates: np.ndarray, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Intervals that hold for all figures at once, so that the best of them may be picked and still be believed.

    Percentile intervals of the bootstrap, all of one tail, the widest tail t for which the share `level` of the replicates lies
    within the intervals of all figures together (Mandel and Betensky 2008). t is .025 for one figure and .0051 for five
    independent ones (1.96 and 2.57 standard errors if they are normal), and between the two if they go together. Unlike
    intervals of point ± c · se they follow a skewed figure, such as a ratio to a count near 0, to its longer side.

    Args:
        points: `[F]` figures; each is within its interval.
        replicates: `[B, F]` the same figures in each bootstrap replicate; finite.

    Returns `[F]` lower and `[F]` upper ends; a figure that never varies has an interval without width.
    """
    varies = replicates.std(axis=0) > 1e-12
    if not varies.any():
        return points.copy(), points.copy()
    count = len(replicates)
    drawn = replicates[:, varies]
    # 0 for the smallest, 1 for the largest of a figure's replicates; equal ones are apart, which errs on the wide side
    place = drawn.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable") / max(1, count - 1)
    outermost = np.maximum(place, 1 - place).max(axis=1)
    reach = float(np.quantile(outermost, level))
    low, high = points.copy(), points.copy()
    low[varies] = np.minimum(points[varies], np.quantile(drawn, 1 - reach, axis=0))
    high[varies] = np.maximum(points[varies], np.quantile(drawn, reach, axis=0))
    return low, high
