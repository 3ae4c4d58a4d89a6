"""Bootstrap replicates of the fit and of the rates under Q, all at once

A probe has 2,000 replicates, and one by one their fits would take longer than the sampling of a small model. The figures are
those of `Recoverability.observe` and `ProbeArrays.expected`, up to rounding.

Shapes: B replicates, N failed rollouts, L labels, G distinct depths, M candidates of a rollout at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from deepgrpo.config import RecoverabilityConfig
from deepgrpo.lab.probe.arrays import ProbeArrays


@dataclass(frozen=True, slots=True)
class Fits:
    """`[B]` fits of P(success | r) = sigmoid(w r + b); P is 1 where `fitted` is False."""

    w: np.ndarray
    b: np.ndarray
    fitted: np.ndarray

    def log_probability(self, depths: np.ndarray) -> np.ndarray:
        """`[B, M]` logs of P for `[M]` depths."""
        score = self.w[:, None] * depths + self.b[:, None]
        return np.where(self.fitted[:, None], -np.logaddexp(0.0, -score), 0.0)


def fit_replicates(ratios: np.ndarray, outcomes: np.ndarray, times: np.ndarray, config: RecoverabilityConfig) -> Fits:
    """Fit the labels of every replicate.

    Args:
        ratios, outcomes: `[L]` labels.
        times: `[B, L]` how often each label occurs in each replicate.
        config: the recipe's section; no window is applied.
    """
    depths, group = np.unique(ratios, return_inverse=True)
    member = np.eye(len(depths))[group.reshape(-1)]
    counts, successes = times @ member, times @ (member * outcomes[:, None])
    total, right = counts.sum(1), successes.sum(1)
    fitted = (total > config.min_items) & (right > 0) & (right < total) & (config.model == "logistic")
    w, b = np.zeros(len(times)), np.zeros(len(times))
    if fitted.any():
        w[fitted], b[fitted] = _newton(depths, counts[fitted], successes[fitted], config.l2)
    return Fits(w, b, fitted)


def _newton(depths: np.ndarray, counts: np.ndarray, successes: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Damped Newton steps as in `recoverability.fit_logistic`, for `[B, G]` counts of labels and of successes."""

    def score(w: np.ndarray, b: np.ndarray) -> np.ndarray:
        found: np.ndarray = w[:, None] * depths + b[:, None]
        return found

    def objective(w: np.ndarray, b: np.ndarray) -> np.ndarray:
        s = score(w, b)
        found: np.ndarray = 0.5 * w**2 + c * (counts * np.logaddexp(0.0, s) - successes * s).sum(1)
        return found

    w, b = np.zeros(len(counts)), np.zeros(len(counts))
    value = objective(w, b)
    for _ in range(100):
        probability = 1.0 / (1.0 + np.exp(-score(w, b)))
        error, spread = c * (counts * probability - successes), c * counts * probability * (1 - probability)
        along_w, along_b = w + (error * depths).sum(1), error.sum(1)
        ww, wb, bb = 1.0 + (spread * depths**2).sum(1), (spread * depths).sum(1), spread.sum(1) + 1e-12
        determinant = ww * bb - wb**2
        step_w, step_b = (bb * along_w - wb * along_b) / determinant, (ww * along_b - wb * along_w) / determinant
        if max(np.abs(step_w).max(), np.abs(step_b).max()) < 1e-9:
            break
        scale = np.ones(len(w))
        while True:
            after = objective(w - scale * step_w, b - scale * step_b)
            worse = (after > value + 1e-12 * np.abs(value)) & (scale > 1e-6)
            if not worse.any():
                break
            scale[worse] /= 2
        w, b, value = w - scale * step_w, b - scale * step_b, after
    return w, b


def rates_under_q(table: ProbeArrays, fits: Fits, weights: np.ndarray) -> Callable[[float], np.ndarray]:
    """A function from gamma to `[B, 2]`: expected mixed groups and tokens of one pivot in each rollout, summed.

    Rollouts with the same candidates have the same Q, so their sums are taken first.

    Args:
        weights: `[B, N]` multiplicity of each rollout in each replicate.
    """
    rows, member = np.unique(table.every_ratio, axis=0, return_inverse=True, equal_nan=True)
    kinds = []
    for number, row in enumerate(rows):
        of_kind = np.flatnonzero(member.reshape(-1) == number)
        there = np.flatnonzero(~np.isnan(row))
        if not len(there):
            continue  # no pivot
        sums = np.zeros((2, len(of_kind), len(row)))
        for which, values in enumerate((table.mixed, table.tokens)):
            np.add.at(
                sums[which], (np.arange(len(of_kind))[:, None], table.place[of_kind]), (table.stands_for * values)[of_kind]
            )
        kinds.append((row[there], fits.log_probability(row[there]), weights[:, of_kind] @ sums[:, :, there]))

    def rates(gamma: float) -> np.ndarray:
        found = np.zeros((len(weights), 2))
        for depths, log_probability, sums in kinds:
            raw = log_probability + gamma * np.log(depths)
            q = np.exp(raw - np.logaddexp.reduce(raw, axis=1, keepdims=True))
            found += (sums * q).sum(axis=2).T
        return found

    return rates
