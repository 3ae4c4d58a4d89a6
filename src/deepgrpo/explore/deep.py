"""DEEP-GRPO (arXiv:2602.14169): resample from a deep but recoverable pivot of every failed rollout.

    chain of a rollout  = root, end of segment 1, ..., end of segment m        (length m + 1)
    candidates          = all of them but the last                             (index 0 .. m - 1)
    depth ratio         r = (index + 1) / (m + 1)
    Q(r)                ∝ P(success | r) · r^gamma                             P: recoverability.py

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
from deepgrpo.explore.base import Limits, State, main_pivot
from deepgrpo.explore.recoverability import Recoverability
from deepgrpo.explore.segments import Segmenter, build_segmenter
from deepgrpo.records import Credit, Pivot, Tree


@dataclass(frozen=True)
class DeepStrategy:
    config: DeepExplore
    segment: Segmenter
    scale: Literal["none", "std"] = "none"

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
        pivots: list[Pivot] = []
        for index, node in tree.stream("main"):
            if self.config.expand == "all" or node.reward <= self.config.success_threshold:
                pivots += self._choose(index, node.tokens, recoverability, limits.response(tree), random)
        return pivots

    def _choose(
        self, index: int, tokens: Sequence[int], recoverability: Recoverability, room: int, random: np.random.Generator
    ) -> list[Pivot]:
        offsets, ratios = candidates(self.segment(tokens), room=room, root=self.config.root_pivot)
        if not offsets:
            return []
        log_q = log_weights(ratios, recoverability, self.config.gamma)
        q = np.exp(log_q)
        chosen = draw_without_replacement(log_q, self.config.num_pivots, random)
        return [
            Pivot(
                parent=index, offset=offsets[i], num_branches=self.config.branches_per_pivot, ratio=ratios[i],
                candidates=tuple(offsets), q=tuple(float(p) for p in q),
            )
            for i in chosen
        ]  # fmt: skip

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


def candidates(ends: Sequence[int], *, room: int, root: bool = True) -> tuple[list[int], list[float]]:
    """Offsets and depth ratios of the states that may become pivots.

    Args:
        ends: ascending ends of the segments; the last one is the end of the rollout.
        room: longest response; a state must leave space for at least one more token.
        root: whether the prompt itself is among them (index 0 of the chain, ratio 1 / len(chain)).

    Example: ends [10, 20, 30, 40] make a chain of 5; candidates at 0, 10, 20, 30 with r = .2, .4, .6, .8.
    """
    chain = [0, *ends]
    keep = [i for i in range(0 if root else 1, len(chain) - 1) if chain[i] < room]
    return [chain[i] for i in keep], [(i + 1) / len(chain) for i in keep]


def log_weights(ratios: Sequence[float], recoverability: Recoverability, gamma: float) -> np.ndarray:
    """`log Q`, normalised: `Q(r) ∝ P(success | r) · r^gamma`. In logs, so that gamma = -20 does not underflow."""
    depth = np.asarray(ratios, dtype=np.float64)
    raw = recoverability.log_probability(depth) + gamma * np.log(depth)
    normalised: np.ndarray = raw - np.logaddexp.reduce(raw)
    return normalised


def draw_without_replacement(log_q: np.ndarray, count: int, random: np.random.Generator) -> list[int]:
    """Draw distinct indices one after the other, each time in proportion to Q among those left.

    By the Gumbel trick: the order of `log q + Gumbel noise`, from the top, has exactly this distribution.
    """
    noisy = log_q + random.gumbel(size=len(log_q))
    return [int(i) for i in np.argsort(-noisy, kind="stable")[: min(count, len(log_q))]]
