"""P(success | depth): the probability that K continuations from a depth include at least one success.

`model = "bins"`: the share of rescued pivots by bins of the depth ratio r, which can follow a cliff behind the last step.
`model = "logistic"`: a logistic regression on r alone, with an L2 penalty on w and none on b, the objective of scikit-learn's
LogisticRegression: `min_{w,b} w²/2 + C Σ log(1 + exp(-y (w r + b)))`, y = ±1. Its data are the latest pivots. It is
fitted between steps, in prompt order, so that a run can be resumed and does not depend on the number of workers
(docs/details.md 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from deepgrpo.config import RecoverabilityConfig
from deepgrpo.runs.facts import depth_bin


@dataclass(frozen=True, slots=True)
class Recoverability:
    """The estimate and its data.

    Example: with w = -3.175 and b = 1.427, P(0.1) = 0.752 and P(1) = 0.148.
    """

    ratios: tuple[float, ...] = ()
    outcomes: tuple[int, ...] = ()
    """1: at least one of the continuations succeeded."""
    w: float = 0.0
    b: float = 0.0
    rates: tuple[float, ...] = ()
    """For `model = "bins"`: P in each bin of r, (0, 1/B] to (1 - 1/B, 1]; empty: the logistic regression is used."""
    fitted: bool = False
    """Before the first fit P = 1 at every depth."""

    def probability(self, ratios: Sequence[float] | np.ndarray) -> np.ndarray:
        """`[n]` estimates for `[n]` depth ratios in (0, 1]."""
        probability: np.ndarray = np.exp(self.log_probability(ratios))
        return probability

    def log_probability(self, ratios: Sequence[float] | np.ndarray) -> np.ndarray:
        depth = np.asarray(ratios, dtype=np.float64)
        if self.rates:
            logs: np.ndarray = np.log(self.rates)[_bins_of(depth, len(self.rates))]
            return logs
        return -np.logaddexp(0.0, -(self.w * depth + self.b)) if self.fitted else np.zeros_like(depth)

    def observe(self, ratios: Sequence[float], outcomes: Sequence[int], config: RecoverabilityConfig) -> Recoverability:
        """Append, drop the oldest items beyond the window, and refit if both outcomes are present.

        A fitted estimate stays in use even if the window later holds a single outcome.
        """
        kept_ratios = (*self.ratios, *ratios)[-config.window :]
        kept_outcomes = (*self.outcomes, *outcomes)[-config.window :]
        w, b, rates, fitted = self.w, self.b, self.rates, self.fitted
        enough = len(kept_outcomes) > config.min_items and 0 < sum(kept_outcomes) < len(kept_outcomes)
        if config.model == "logistic" and enough:
            w, b = fit_logistic(np.array(kept_ratios), np.array(kept_outcomes), c=config.l2)
            fitted = True
        if config.model == "bins" and enough:
            rates = rates_by_bin(np.array(kept_ratios), np.array(kept_outcomes), config.bins)
            fitted = True
        return Recoverability(kept_ratios, kept_outcomes, w, b, rates, fitted)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Any) -> Recoverability:
        tuples = {name: tuple(raw[name]) for name in ("ratios", "outcomes", "rates")}
        return cls(**{**raw, **tuples})


def rates_by_bin(ratios: np.ndarray, outcomes: np.ndarray, bins: int) -> tuple[float, ...]:
    """Share of successes in each bin, (s + 1) / (n + 2) by Laplace's rule, so that no bin is ever ruled out.

    Args:
        ratios: `[N]` float.
        outcomes: `[N]` 0 or 1.
    """
    index = _bins_of(ratios, bins)
    tried = np.bincount(index, minlength=bins)
    rescued = np.bincount(index, weights=outcomes, minlength=bins)
    return tuple(map(float, (rescued + 1) / (tried + 2)))


def _bins_of(ratios: np.ndarray, bins: int) -> np.ndarray:
    return np.array([depth_bin(ratio, bins) for ratio in ratios.flat], dtype=int).reshape(ratios.shape)


def fit_logistic(ratios: np.ndarray, outcomes: np.ndarray, *, c: float = 1.0) -> tuple[float, float]:
    """Fit (w, b) of the penalised logistic regression by damped Newton steps (the objective is convex, with two unknowns).

    Args:
        ratios: `[N]` float.
        outcomes: `[N]` 0 or 1; both must occur.
        c: inverse of the penalty's strength, scikit-learn's C.
    """
    design = np.stack([ratios, np.ones_like(ratios)], axis=1)
    penalty = np.array([1.0, 0.0])
    theta = np.zeros(2)

    def objective(theta: np.ndarray) -> float:
        score = design @ theta
        return float(0.5 * theta[0] ** 2 + c * np.sum(np.logaddexp(0.0, score) - outcomes * score))

    value = objective(theta)
    for _ in range(100):
        probability = 1.0 / (1.0 + np.exp(-(design @ theta)))
        gradient = penalty * theta + c * design.T @ (probability - outcomes)
        curvature = np.diag(penalty) + c * (design * (probability * (1 - probability))[:, None]).T @ design
        step = np.linalg.solve(curvature + 1e-12 * np.eye(2), gradient)
        if np.abs(step).max() < 1e-12:
            break
        scale = 1.0
        while objective(theta - scale * step) > value and scale > 1e-6:
            scale /= 2
        theta = theta - scale * step
        value = objective(theta)
    return float(theta[0]), float(theta[1])
