"""DEEP-GRPO's control: the pivot of every failed rollout is drawn uniformly.

The candidates, the rollouts that are expanded, the branches and the credit are those of `deep`; only Q differs, and nothing
is learned. What `deep` wins over this is what its choice of the depth is worth; what this wins over `root` is what resampling
inside a rollout is worth, wherever.

    Q = 1 / n      for each of the n candidates of a rollout (pivots.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deepgrpo.config import RandomExplore
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.explore.base import Limits, Signal, State, main_pivot
from deepgrpo.explore.pivots import draw_pivots
from deepgrpo.explore.segments import Segmenter, build_segmenter
from deepgrpo.records import Credit, Pivot, Tree


@dataclass(frozen=True)
class RandomStrategy:
    config: RandomExplore
    segment: Segmenter
    scale: Literal["none", "std"] = "none"
    signals: frozenset[Signal] = frozenset()

    @classmethod
    def build(cls, config: RandomExplore, scale: Literal["none", "std"], tokenizer: Any) -> RandomStrategy:
        return cls(config, build_segmenter(config.segments, tokenizer), scale)

    def initial_state(self) -> State:
        return {}

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        if not tree.pivots:
            return [main_pivot(self.config.num_rollouts)]
        if len(tree.pivots) > 1 or not self.config.num_pivots:
            return []
        return draw_pivots(tree, self.config, self.segment, log_uniform, limits, random)

    def returns(self, level: int) -> bool:
        return level == 0 and self.config.num_pivots > 0

    def credit(self, tree: Tree) -> Credit:
        return sibling_credit(tree, self.scale)

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        return state

    def report(self, state: State) -> dict[str, float]:
        return {}


def log_uniform(ratios: Sequence[float]) -> np.ndarray:
    """`log Q` of the uniform distribution over `[n]` candidates, wherever they lie."""
    return np.full(len(ratios), -np.log(len(ratios)))
