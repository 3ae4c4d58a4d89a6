"""GRPO: every rollout starts at the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deepgrpo.config import RootExplore
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.explore.base import Limits, Signal, State, main_pivot
from deepgrpo.records import Credit, Pivot, Tree


@dataclass(frozen=True)
class RootStrategy:
    config: RootExplore
    scale: Literal["none", "std"] = "none"
    signals: frozenset[Signal] = frozenset()

    @classmethod
    def build(cls, config: RootExplore, scale: Literal["none", "std"], tokenizer: Any) -> RootStrategy:
        return cls(config, scale)

    def initial_state(self) -> State:
        return {}

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        return [] if tree.pivots else [main_pivot(self.config.num_rollouts)]

    def returns(self, level: int) -> bool:
        return False

    def credit(self, tree: Tree) -> Credit:
        return sibling_credit(tree, self.scale)

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        return state

    def report(self, state: State) -> dict[str, float]:
        return {}
