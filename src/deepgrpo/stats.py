"""Uncertainty of the figures: standard errors, intervals for clustered counts, and paired differences over seeds.

Counts: a cluster is a prompt. Rollouts of one prompt, and continuations of one rollout, are correlated; treating them as
independent makes every interval too narrow.

Paired differences: the unit is the seed. Both arms of a pair start from the same weights and see the same questions, so
their difference cancels what the seed does to both. Questions are not resampled: the interval is about other seeds on these
questions. Worked example: the signs of 6 differences agree by chance in 2 of 64 cases = 3.1%, so a test at 5% rejects that
the typical difference is 0 exactly then, and the 95% interval is the range of the six. With 5 seeds the signs agree in 2 of 32
cases = 6.3%: the range is all that can be said, and it covers less than 95%.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

INTERVALS = (
    "Intervals are those of the exact signed-rank test (Wilcoxon) over the paired seeds, on these questions: at least 95% for "
    "symmetric differences from 6 seeds on, the full range with fewer."
)
"""Note for readers of intervals by `paired_interval`."""


def finite_mean(values: Sequence[float]) -> float:
    """Mean of finite numbers, which is finite even where their sum is not. Example: of 1e308 and 1.5e308 it is 1.25e308."""
    found = np.asarray(values, dtype=np.float64)
    with np.errstate(over="ignore"):
        mean = float(found.mean())
    return mean if math.isfinite(mean) else float((found / len(found)).sum())


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of one value per prompt: `sqrt(sum (v - mean)^2 / (n (n-1)))`.

    The unit is the prompt: with several samples per prompt, pass the means per prompt, as samples of one prompt are not
    independent. It measures variation over other prompts of the same kind, not over training seeds.

    Returns 0 for a single value. Raises ValueError for none.
    """
    n = len(values)
    if n == 0:
        raise ValueError("the standard error of no values is not defined")
    if n == 1:
        return 0.0
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n * (n - 1)))


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Wilson score interval (95%) of a success rate; unlike mean ± z·se it stays inside [0, 1] and works at 0 and n.

    `(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)` with p = successes / n; Wilson 1927.

    Args:
        successes: number of successes, 0..n.
        n: number of trials, at least 1.

    Raises:
        ValueError: n < 1, or successes out of range.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a success rate needs n >= 1 and 0 <= successes <= n, but successes = {successes}, n = {n}")
    p, z = successes / n, 1.959963984540054  # normal quantile
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
    """Share of successes with a Wilson interval at the effective number of trials.

    `p = Σ s_c / Σ n_c`, `deff = max(1, v / v0)` with `v = C/(C-1) Σ (s_c - p n_c)² / n²` (the variance of a ratio between
    clusters) and `v0 = p (1-p) / (n-1)` (that of n independent trials); Wilson's interval is taken at `n / deff` trials
    (Korn and Graubard 1998 do the same with another interval). If all trials or none succeed, v is uninformative, and a
    cluster counts as one trial.

    Args:
        successes, trials: `[C]` per cluster, with 0 ≤ s_c ≤ n_c and n_c ≥ 1.

    With one trial per cluster it is the plain Wilson interval: 8 of 10 give [0.490, 0.943].
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
    # the formula needs whole trials; rounding down errs on the wide side
    effective = max(1, math.floor(worth + 1e-9))
    low, high = wilson_interval(p * effective, effective)
    return Proportion(p, low, high, int(total), count)


def cluster_weights(clusters: Sequence[str], replicates: int, random: np.random.Generator) -> np.ndarray:
    """Multiplicity of each item in each bootstrap replicate, drawing whole clusters with replacement: `[replicates, N]` ints.

    Args:
        clusters: `[N]` cluster of each item.
    """
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    drawn = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=replicates)
    weights: np.ndarray = drawn[:, member.reshape(-1)]
    return weights


def simultaneous_intervals(points: np.ndarray, replicates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Simultaneous intervals: they hold for all figures at once, so that the best figure may be picked and still be trusted.

    Bootstrap percentile intervals with a common tail t, the largest for which 95% of the replicates are inside the
    intervals of all figures together (Mandel and Betensky 2008). t is .025 for one figure, .0051 for five independent ones
    (1.96 and 2.57 standard errors if normal), and between the two for correlated ones. Unlike point ± c · se, they follow a
    skewed figure, such as a ratio to a count near 0, to its longer side.

    Args:
        points: `[F]` figures; each is inside its interval.
        replicates: `[B, F]` the same figures in each bootstrap replicate; finite.

    Returns `[F]` lower and `[F]` upper ends; a figure that never varies has an interval of width 0.
    """
    varies = replicates.std(axis=0) > 1e-12
    if not varies.any():
        return points.copy(), points.copy()
    count = len(replicates)
    drawn = replicates[:, varies]
    # rank from 0 (smallest replicate of a figure) to 1 (largest); ties are ranked apart, which errs on the wide side
    place = drawn.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable") / max(1, count - 1)
    outermost = np.maximum(place, 1 - place).max(axis=1)
    reach = float(np.quantile(outermost, 0.95))
    low, high = points.copy(), points.copy()
    low[varies] = np.minimum(points[varies], np.quantile(drawn, 1 - reach, axis=0))
    high[varies] = np.maximum(points[varies], np.quantile(drawn, reach, axis=0))
    return low, high


# ---------------------------------------------------------------- paired differences over seeds


@dataclass(frozen=True, slots=True)
class Interval:
    """Summary of paired differences.

    Example, for the differences -1, 0, 4: Interval(mean=1.0, low=-1.0, high=4.0, n=3, above=1, below=1, sign_p=1.0).
    """

    mean: float
    low: float
    high: float
    n: int
    """Pairs, one per seed."""
    above: int
    """Seeds in which the difference is positive."""
    below: int
    sign_p: float
    """Two-sided sign test, ties left out: probability that a fair coin splits the seeds at least as unevenly."""


def paired_interval(differences: Sequence[float], level: float = 0.95) -> Interval:
    """Interval over seeds of a typical difference: all values that Wilcoxon's exact signed-rank test does not reject.

    With the averages of all pairs, `w_1 <= ... <= w_M` of `(d_i + d_j) / 2` for i <= j, it is `[w_k, w_(M+1-k)]` with the
    largest k such that `P(W+ <= k - 1) <= (1 - level) / 2` (Hodges and Lehmann 1963). It covers the mean of symmetric
    differences with at least `level` from 6 seeds on, whatever their tails. With fewer seeds it is the full range, which covers
    the median with `1 - 2^(1-n)`: .94 for 5 seeds, .75 for 3.

    Of five intervals it has the best measured coverage at 6 and 8 seeds (benchmarks/coverage.py). Under skewed differences it
    covers the mean in 92 to 94 of 100 cases, Student's t in 88 to 91.

    Args:
        differences: one per seed, at least 2, in any unit.
        level: in (0, 1).

    Raises:
        ValueError: fewer than two differences, or one that is not finite, or a level out of range.
    """
    if len(differences) < 2:
        raise ValueError(f"an interval over seeds needs at least 2 of them, not {len(differences)}")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it should be between 0 and 1")
    value_N = np.array(sorted(differences), dtype=np.float64)  # sorted: no result depends on the order of the seeds
    if not np.isfinite(value_N).all():
        raise ValueError(f"differences must be finite numbers, not {list(differences)}")
    i, j = np.triu_indices(len(value_N))
    walsh = np.sort((value_N[i] + value_N[j]) / 2)
    k = max(1, int(np.searchsorted(_signed_rank_cdf(len(value_N)), (1.0 - level) / 2.0, side="right")))
    above, below = int((value_N > 0).sum()), int((value_N < 0).sum())
    return Interval(
        float(value_N.mean()), float(walsh[k - 1]), float(walsh[-k]), len(value_N), above, below, sign_test(above, below)
    )


def sign_test(above: int, below: int) -> float:
    """Two-sided exact sign test: min(1, 2 · P(X ≤ min(above, below))) with X ~ Binomial(above + below, 1/2).

    5 against 0 gives 2 / 32 = 0.0625, the smallest value for 5 seeds. 1 if every pair is a tie.
    """
    n = above + below
    tail: int = sum(math.comb(n, i) for i in range(min(above, below) + 1))
    return min(1.0, float(2 * tail / 2**n))


@lru_cache(maxsize=16)
def _signed_rank_cdf(n: int) -> np.ndarray:
    """`P(W+ <= w)` for w = 0, 1, ..., n(n+1)/2: W+ is the sum of a random subset of the ranks 1..n."""
    counts = np.ones(1)
    for rank in range(1, n + 1):
        counts = np.convolve(counts, np.concatenate([[1.0], np.zeros(rank - 1), [1.0]]))
    cdf: np.ndarray = np.cumsum(counts) / counts.sum()
    return cdf
