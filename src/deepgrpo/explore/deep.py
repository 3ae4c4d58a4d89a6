"""DEEP-GRPO (arXiv:2602.14169): resample from a deep but recoverable pivot of every failed rollout.

    Q(r) ∝ P(success | r) · r^gamma      r: depth of a candidate (pivots.py)      P: recoverability.py

Two rounds: G rollouts from the prompt; then, for every failed rollout, `num_pivots` candidates drawn without replacement
from Q, with K continuations each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.config import DeepExplore
from deepgrpo.explore.base import State
from deepgrpo.explore.pivots import PivotStrategy
from deepgrpo.explore.recoverability import Recoverability
from deepgrpo.records import Node, Tree
from deepgrpo.runs.facts import succeeds


@dataclass(frozen=True)
class DeepStrategy(PivotStrategy[DeepExplore]):
    def initial_state(self) -> State:
        return Recoverability().to_dict()

    def log_q(self, node: Node, offsets: Sequence[int], ratios: Sequence[float], state: State) -> np.ndarray:
        return log_q(ratios, Recoverability.from_dict(state), self.config.gamma)

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        """Label each pivot of the step: 1 if at least one of its branches succeeded."""
        ratios: list[float] = []
        outcomes: list[int] = []
        for tree in trees:
            for index, pivot in enumerate(tree.pivots):
                if pivot.stream == "branch":
                    ratios.append(pivot.ratio)
                    outcomes.append(int(succeeds(tree, index, self.config.success_threshold)))
        return Recoverability.from_dict(state).observe(ratios, outcomes, self.config.recoverability).to_dict()

    def report(self, state: State) -> dict[str, float]:
        estimate = Recoverability.from_dict(state)
        return {
            "recoverability/w": estimate.w,
            "recoverability/b": estimate.b,
            "recoverability/fitted": float(estimate.fitted),
            "recoverability/items": float(len(estimate.outcomes)),
        }


def log_q(ratios: Sequence[float] | np.ndarray, recoverability: Recoverability, gamma: float) -> np.ndarray:
    """`log Q`, normalised: `Q(r) ∝ P(success | r) · r^gamma`. In logs, so that gamma = -20 does not underflow.

    Args:
        ratios: `[n]` depth ratios of a rollout's candidates, or `[N, n]` of several rollouts; nan pads a shorter row and
            gets -inf.
    """
    depth = np.asarray(ratios, dtype=np.float64)
    padding = np.isnan(depth)
    depth = np.where(padding, 1.0, depth)
    raw = np.where(padding, -np.inf, recoverability.log_probability(depth) + gamma * np.log(depth))
    total = np.logaddexp.reduce(raw, axis=-1, keepdims=True)
    normalised: np.ndarray = raw - np.where(np.isneginf(total), 0.0, total)
    return normalised
