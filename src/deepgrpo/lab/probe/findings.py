"""Figures of a probe: rescue by depth, the fit, Q, and mixed groups per sampled token.

For a failed rollout i and a candidate state c let m = 1 if the K continuations have unequal rewards (a mixed group: only these
carry signal), and T their number of tokens.

    rate(band)  = 1000 · Σ_i m / Σ_i T                                 over the states measured in the band
    gain(band)  = rate(band) / rate(prompt), both over the rollouts with a state in the band
    rate(gamma) = 1000 · Σ_i Σ_c Q_i(c) m_ic / Σ_i Σ_c Q_i(c) T_ic     Q as in explore/deep.py, over all candidates
    gain(gamma) = rate(gamma) / rate(prompt)

The inner sums run over all candidates, but only one per band was measured. It was drawn uniformly among the n candidates of
its band, so it enters with weight n · Q, and the estimate of each sum is unbiased (Horvitz and Thompson 1952).

Uncertainty: everything, including the fit, is recomputed in bootstrap replicates that draw prompts with replacement. Both
counts of a gain are increased by half a group, in a replicate by a draw of Gamma(1/2) (Jeffreys' prior of a count): a depth
without any mixed group then has a wide interval, and no division by zero occurs. Intervals of the gains are simultaneous over
the bands and over the gammas, so that the best of them may be picked.

Shapes: N failed rollouts, S bands, M candidates of a rollout at most, B replicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo import rng
from deepgrpo.config import RecoverabilityConfig
from deepgrpo.explore.recoverability import Recoverability
from deepgrpo.lab.probe.arrays import ProbeArrays
from deepgrpo.lab.probe.replicates import Fits, fit_replicates, rates_under_q
from deepgrpo.lab.probe.sampling import MIN_FAILED, FailedRollout
from deepgrpo.stats import Proportion, cluster_weights, clustered_proportion, simultaneous_intervals

REPLICATES = 2000
MIN_MIXED = 10
"""Minimum number of mixed groups, both sides of a comparison together."""

HALF = np.array([0.5])


@dataclass(frozen=True, slots=True)
class Band:
    """One line of the table: the prompt, or a band of depths."""

    band: int
    low: float
    high: float
    """Depth range (low, high]; both 0 for the prompt."""
    states: int
    ratio: float
    """Mean depth of its states."""
    rescue: Proportion
    """States with at least one success among K."""
    success: Proportion
    """Continuations that succeed."""
    tokens: float
    """Mean sampled tokens per group of K."""
    mixed: int
    mixed_per_1k: float
    mixed_low: float
    mixed_high: float
    gain: float | None = None
    """Mixed groups per token relative to the prompt; None if there are too few to compare."""
    gain_low: float | None = None
    gain_high: float | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """P(success | r) = sigmoid(w r + b), fitted to these labels as in training, with bootstrap intervals."""

    w: float
    b: float
    fitted: bool
    """False with too few labels or a single outcome; P is then 1 at every depth."""
    items: int
    w_low: float
    w_high: float
    b_low: float
    b_high: float


@dataclass(frozen=True, slots=True)
class Gamma:
    """Expected effect of a gamma."""

    gamma: float
    depth: float
    """Mean depth ratio of its pivots."""
    q: tuple[float, ...]
    """Share of its pivots at the prompt and in each band; sums to 1."""
    mixed_per_1k: float
    gain: float
    gain_low: float
    gain_high: float


@dataclass(frozen=True, slots=True)
class Findings:
    """All figures of a probe."""

    bands: tuple[Band, ...]
    """The prompt, then the bands with states."""
    fit: Fit
    gammas: tuple[Gamma, ...]
    """Empty if there are too few mixed groups to compare."""
    mixed: int
    """Total number of mixed groups."""

    @property
    def best_band(self) -> Band | None:
        """The band with the most mixed groups per token, relative to the prompt."""
        compared = [band for band in self.bands if band.gain is not None]
        return max(compared, key=lambda band: band.gain or 0.0, default=None)

    @property
    def best_gamma(self) -> Gamma | None:
        """The gamma with the most mixed groups per token; the first of equal ones."""
        return max(self.gammas, key=lambda gamma: gamma.gain, default=None)


def analyse(
    failed: Sequence[FailedRollout], *, bands: int, gammas: Sequence[float], recoverability: RecoverabilityConfig,
    root_pivot: bool = True, seed: int = 0, replicates: int = REPLICATES,
) -> Findings:  # fmt: skip
    """All figures of a probe from its failed rollouts.

    Args:
        failed: at least one.
        bands: S, as in sampling.
        recoverability: the recipe's section; its window is widened to hold all labels.
        root_pivot: True if the prompt may become a pivot. It is the standard of comparison in either case.
        seed: random seed of the bootstrap.
    """
    table = ProbeArrays(failed, bands, root_pivot)
    random = rng.generator(seed, "probe", "bootstrap")
    weights = cluster_weights(table.prompts, replicates, random)
    pseudo = random.gamma(0.5, size=replicates)
    estimate, estimates = _fits(table, recoverability, root_pivot, weights)
    mixed = int(table.mixed.sum())
    chosen: tuple[Gamma, ...] = ()
    if mixed >= MIN_MIXED and table.has_pivot.any():
        chosen = _gammas(table, gammas, estimate, estimates, weights, pseudo)
    return Findings(_bands(table, weights, pseudo), _fit(estimate, estimates), chosen, mixed)


# ---------------------------------------------------------------- by depth


def _bands(table: ProbeArrays, weights: np.ndarray, pseudo: np.ndarray) -> tuple[Band, ...]:
    used = [band for band in range(table.there.shape[1]) if table.there[:, band].any()]
    # compare the same rollouts on both sides: those that reach a band may differ from the others
    roots = {band: table.there[:, [band]] * table.pair(0) for band in used}
    compared = [
        band for band in used
        if band and table.there[:, band].sum() >= MIN_FAILED
        and table.pair(band)[:, 0].sum() + roots[band][:, 0].sum() >= MIN_MIXED
    ]  # fmt: skip
    gains: dict[int, tuple[float, float, float]] = {}
    if compared:
        points = np.array([_log_gain(table.pair(band).sum(0)[None], roots[band].sum(0)[None], HALF)[0] for band in compared])
        drawn = [_log_gain(weights @ table.pair(band), weights @ roots[band], pseudo) for band in compared]
        gains = dict(zip(compared, _with_intervals(points, np.stack(drawn, axis=1)), strict=True))
    return tuple(_band(table, band, weights @ table.pair(band), gains.get(band)) for band in used)


def _band(table: ProbeArrays, band: int, drawn: np.ndarray, gain: tuple[float, float, float] | None) -> Band:
    there = table.there[:, band] > 0

    def share(successes: np.ndarray, trials: np.ndarray) -> Proportion:
        counts = np.stack([np.bincount(table.cluster, values[:, band]) for values in (successes, trials)])
        return clustered_proportion(*counts[:, counts[1] > 0])

    states, mixed, tokens = int(there.sum()), int(table.mixed[:, band].sum()), float(table.tokens[:, band].sum())
    low, high = np.quantile(1000 * drawn[:, 0] / np.maximum(drawn[:, 1], 1), [0.025, 0.975])
    size = table.there.shape[1] - 1
    return Band(
        band, max(0, band - 1) / size, band / size, states, float(table.ratio[there, band].mean()),
        share(table.rescued, table.there), share(table.successes, table.trials), tokens / states,
        mixed, 1000 * mixed / tokens, float(low), float(high), *(gain or ()),
    )  # fmt: skip


def _log_gain(here: np.ndarray, root: np.ndarray, pseudo: np.ndarray) -> np.ndarray:
    """`[B, 2]` mixed groups and tokens here and at the prompt → `[B]` log of the ratio of their rates."""
    # a replicate without any rollout of the band yields a ratio near 1
    counts, tokens = (np.stack([here[:, i], root[:, i]]) for i in (0, 1))
    rates = np.log(counts + pseudo) - np.log(np.maximum(tokens, 1.0))
    gain: np.ndarray = rates[0] - rates[1]
    return gain


def _with_intervals(points: np.ndarray, drawn: np.ndarray) -> list[tuple[float, float, float]]:
    """Logs of ratios `[F]` and of their replicates `[B, F]` → ratios with simultaneous intervals."""
    low, high = simultaneous_intervals(points, drawn)
    return [(math.exp(p), math.exp(a), math.exp(z)) for p, a, z in zip(points, low, high, strict=True)]


# ---------------------------------------------------------------- fit and gammas


def _fits(
    table: ProbeArrays, config: RecoverabilityConfig, root_pivot: bool, weights: np.ndarray
) -> tuple[Recoverability, Fits]:
    """The estimate that training would make, and that of each replicate."""
    labelled = table.there.copy()
    if not root_pivot:
        labelled[:, 0] = 0
    rows, columns = np.nonzero(labelled)
    ratios, outcomes = table.ratio[rows, columns], table.rescued[rows, columns].astype(int)
    wide = config.model_copy(update={"window": max(config.window, len(outcomes))})
    estimate = Recoverability().observe(ratios.tolist(), outcomes.tolist(), wide)
    return estimate, fit_replicates(ratios, outcomes, weights[:, rows], config)


def _fit(estimate: Recoverability, estimates: Fits) -> Fit:
    found = np.stack([estimates.w, estimates.b], axis=1)[estimates.fitted]
    if not len(found):
        found = np.array([[estimate.w, estimate.b]])
    (w_low, b_low), (w_high, b_high) = np.quantile(found, [0.025, 0.975], axis=0).tolist()
    return Fit(estimate.w, estimate.b, estimate.fitted, len(estimate.outcomes), w_low, w_high, b_low, b_high)


def _gammas(
    table: ProbeArrays, gammas: Sequence[float], estimate: Recoverability, estimates: Fits,
    weights: np.ndarray, pseudo: np.ndarray,
) -> tuple[Gamma, ...]:  # fmt: skip
    root = table.has_pivot[:, None] * table.pair(0)
    totals = [table.expected(estimate, gamma).sum(axis=0) for gamma in gammas]
    points = np.array([_log_gain(total[None], root.sum(axis=0)[None], HALF)[0] for total in totals])
    rates = rates_under_q(table, estimates, weights)
    drawn = [_log_gain(rates(gamma), weights @ root, pseudo) for gamma in gammas]
    gains = _with_intervals(points, np.stack(drawn, axis=1))
    lines: list[Gamma] = []
    for gamma, (mixed, tokens), gain in zip(gammas, totals, gains, strict=True):
        q = table.q(estimate, gamma) / table.has_pivot.sum()
        shares = np.bincount(table.every_band.ravel(), q.ravel(), minlength=table.there.shape[1])
        depth = float((q * np.nan_to_num(table.every_ratio)).sum())
        lines.append(Gamma(gamma, depth, tuple(shares.tolist()), 1000 * float(mixed) / max(float(tokens), 1.0), *gain))
    return tuple(lines)
