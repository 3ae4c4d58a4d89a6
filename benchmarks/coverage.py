#!/usr/bin/env python
"""Coverage of 95% intervals for a mean of few paired differences, measured by simulation; picks the one that `compare` uses.

    python -m benchmarks.coverage --json docs/results/bench/coverage.json

For each number of pairs and each law of the differences: the share of intervals that contain the true mean, and their median
width over that of Student's t.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from scipy import stats

Interval = tuple[np.ndarray, np.ndarray]
"""Lower and upper ends `[S]`, one per simulation."""

RESAMPLES = 999
PAIRS = (5, 6, 8, 10)
LEVEL = 0.95


# ---------------------------------------------------------------- laws of the differences, each with mean 0


def lognormal(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Skewness 2.3."""
    return np.asarray(random.lognormal(0.0, 0.6, shape) - np.exp(0.18))


def collapses(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """One run in ten collapses: 90% N(0, 1), 10% N(-5, 1)."""
    return np.asarray(random.standard_normal(shape) - 5.0 * (random.random(shape) < 0.1) + 0.5)


LAWS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda random, shape: random.standard_normal(shape),
    "uniform": lambda random, shape: random.random(shape) - 0.5,
    "heavy tails, t with 3 df": lambda random, shape: random.standard_t(3, shape),
    "skewed, lognormal": lognormal,
    "skewed, exponential": lambda random, shape: random.exponential(1.0, shape) - 1.0,
    "1 in 10 collapses": collapses,
}


# ---------------------------------------------------------------- intervals


def student(value_SN: np.ndarray, random: np.random.Generator) -> Interval:
    """Student 1908: mean ± t · se."""
    n = value_SN.shape[1]
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * value_SN.std(axis=1, ddof=1) / np.sqrt(n)
    mean = value_SN.mean(axis=1)
    return mean - half, mean + half


def by_scipy(method: str, value_SN: np.ndarray, random: np.random.Generator) -> Interval:
    """`scipy.stats.bootstrap` (Efron 1979, 1987): percentile or BCa."""
    with np.errstate(all="ignore"):
        found = stats.bootstrap(
            (value_SN,), np.mean, axis=1, vectorized=True, n_resamples=RESAMPLES, method=method, confidence_level=LEVEL,
            rng=random,
        ).confidence_interval  # fmt: skip
    return found.low, found.high


def bootstrap_t(value_SN: np.ndarray, random: np.random.Generator) -> Interval:
    """Studentized bootstrap (Efron 1982, Hall 1988): mean - se · quantiles of (mean* - mean) / se*.

    A resample of equal values has se* = 0 and says nothing; it is left out.
    """
    low, high = np.empty(len(value_SN)), np.empty(len(value_SN))
    n = value_SN.shape[1]
    for i, value_N in enumerate(value_SN):
        drawn = value_N[random.integers(0, n, size=(RESAMPLES, n))]
        se_R = drawn.std(axis=1, ddof=1) / np.sqrt(n)
        kept = se_R > 1e-12
        t_R = (drawn.mean(axis=1)[kept] - value_N.mean()) / se_R[kept]
        q_low, q_high = np.quantile(t_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        se = value_N.std(ddof=1) / np.sqrt(n)
        low[i], high[i] = value_N.mean() - q_high * se, value_N.mean() - q_low * se
    return low, high


def wilcoxon(value_SN: np.ndarray, random: np.random.Generator) -> Interval:
    """The signed-rank test turned around (Hodges and Lehmann 1963): all medians that it does not reject; of Walsh averages."""
    n = value_SN.shape[1]
    i, j = np.triu_indices(n)
    walsh = np.sort((value_SN[:, i] + value_SN[:, j]) / 2, axis=1)
    # P(W+ <= w) exactly, by counting the subsets of ranks 1..n with each sum
    counts = np.ones(1)
    for rank in range(1, n + 1):
        counts = np.convolve(counts, np.concatenate([[1.0], np.zeros(rank - 1), [1.0]]))
    below = np.cumsum(counts) / counts.sum()
    cut = int(np.searchsorted(below, (1 - LEVEL) / 2, side="right"))  # 0: the sample is too small; the widest is given
    return walsh[:, max(cut - 1, 0)], walsh[:, len(i) - max(cut, 1)]


METHODS: dict[str, Callable[[np.ndarray, np.random.Generator], Interval]] = {
    "Student's t": student,
    "percentile bootstrap": partial(by_scipy, "percentile"),
    "BCa bootstrap": partial(by_scipy, "BCa"),
    "bootstrap-t": bootstrap_t,
    "Wilcoxon inverted": wilcoxon,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.simulations, options.seed)
    print("\n".join(table(found)))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(simulations: int, seed: int) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Pairs → law → method → coverage and relative width. Each law has the same draws for all methods."""
    result: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for n in PAIRS:
        for number, (law, draw) in enumerate(LAWS.items()):
            value_SN = draw(np.random.default_rng([seed, n, number]), (simulations, n))
            reference = None
            for method, interval in METHODS.items():
                low, high = interval(value_SN, np.random.default_rng([seed, n, number, 1]))
                width = float(np.median(high - low))
                reference = reference or width
                result.setdefault(str(n), {}).setdefault(law, {})[method] = {
                    "coverage": float(((low <= 0) & (high >= 0)).mean()), "width": width / reference,
                }  # fmt: skip
    return result


def table(found: dict[str, dict[str, dict[str, dict[str, float]]]]) -> list[str]:
    """Coverage in percent, and the median width over that of Student's t, as markdown."""
    lines = ["| pairs | differences | " + " | ".join(METHODS) + " |", "|--:|---" + "|--:" * len(METHODS) + "|"]
    for n, laws in found.items():
        for law, methods in laws.items():
            cells = (f"{100 * each['coverage']:.1f} ({each['width']:.2f}×)" for each in methods.values())
            lines.append(f"| {n} | {law} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
