"""GRPO: every rollout starts at the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepgrpo.config import RootExplore
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.explore.base import Limits, Scaled, State, Stateless, main_pivot
from deepgrpo.records import Credit, Pivot, Tree


@dataclass(frozen=True)
class RootStrategy(Scaled[RootExplore], Stateless):
    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        return [] if tree.pivots else [main_pivot(self.config.num_rollouts)]

    def returns(self, level: int) -> bool:
        return False

    def credit(self, tree: Tree) -> Credit:
        return sibling_credit(tree, self.scale)
