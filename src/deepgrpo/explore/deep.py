"""DEEP-GRPO (arXiv:2602.14169): resample from a deep but recoverable pivot of every failed rollout.

    Q(r) ∝ P(success | r) · r^gamma      r: depth of a candidate (pivots.py)      P: recoverability.py

Two rounds: G rollouts from the prompt; then, for every rollout that failed, `num_pivots` candidates drawn without
replacement from Q, and K continuations at each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deepgrpo.config import DeepExplore
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.explore.base import Limits, Signal, State, main_pivot
from deepgrpo.explore.pivots import draw_pivots
from deepgrpo.explore.recoverability import Recoverability
from deepgrpo.explore.segments import Segmenter, build_segmenter
from deepgrpo.records import Credit, Pivot, Tree


@dataclass(frozen=True)
class DeepStrategy:
    config: DeepExplore
    segment: Segmenter
    scale: Literal["none", "std"] = "none"
    signals: frozenset[Signal] = frozenset()

    @classmethod
    def build(cls, config: DeepExplore, scale: Literal["none", "std"], tokenizer: Any) -> DeepStrategy:
        return cls(config, build_segmenter(config.segments, tokenizer), scale)

    def initial_state(self) -> State:
        return Recoverability().to_dict()

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        if not tree.pivots:
            return [main_pivot(self.config.num_rollouts)]
        if len(tree.pivots) > 1 or not self.config.num_pivots:
            return []
        recoverability = Recoverability.from_dict(state)

        def weigh(ratios: Sequence[float]) -> np.ndarray:
            return log_q(ratios, recoverability, self.config.gamma)

        return draw_pivots(tree, self.config, self.segment, weigh, limits, random)

    def returns(self, level: int) -> bool:
        return level == 0 and self.config.num_pivots > 0

    def credit(self, tree: Tree) -> Credit:
        return sibling_credit(tree, self.scale)

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        """Label each pivot of the step: did at least one of its branches succeed?"""
        ratios: list[float] = []
        outcomes: list[int] = []
        for tree in trees:
            for index, pivot in enumerate(tree.pivots):
                if pivot.stream == "branch":
                    best = max(tree.nodes[child].reward for child in tree.children(index))
                    ratios.append(pivot.ratio)
                    outcomes.append(int(best > self.config.success_threshold))
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

