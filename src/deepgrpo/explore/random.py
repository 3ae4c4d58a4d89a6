"""Control for DEEP-GRPO: the pivots of every failed rollout are drawn uniformly.

Candidates, expanded rollouts, branches and credit are those of `deep`; only Q differs, and nothing is learned. The gain of
`deep` over `random` is the value of its choice of depth; the gain of `random` over `root` is the value of resampling inside a
rollout at all.

    Q = 1 / n      for each of the n candidates of a rollout (pivots.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.config import RandomExplore
from deepgrpo.explore.base import State
from deepgrpo.explore.pivots import PivotStrategy
from deepgrpo.records import Node


@dataclass(frozen=True)
class RandomStrategy(PivotStrategy[RandomExplore]):
    def log_q(self, node: Node, offsets: Sequence[int], ratios: Sequence[float], state: State) -> np.ndarray:
        return log_uniform(ratios)


def log_uniform(ratios: Sequence[float]) -> np.ndarray:
    """`log Q` of the uniform distribution over `[n]` candidates, whatever their depth."""
    return np.full(len(ratios), -np.log(len(ratios)))
