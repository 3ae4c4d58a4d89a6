"""Strategies that branch where segments end: candidates, the draw, and their two rounds.

    chain of a rollout  = root, end of segment 1, ..., end of segment m        (length m + 1)
    candidates          = all of them but the last                             (index 0 .. m - 1)
    depth ratio         r = (index + 1) / (m + 1)

A strategy only adds Q, the distribution over candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import numpy as np

from deepgrpo.config import AllocateExplore, PivotExplore, PrefixExplore
from deepgrpo.credit.group import Scale
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.explore.base import Context, Limits, State, Stateless, main_pivot
from deepgrpo.explore.segments import Segmenter, build_segmenter, node_ends
from deepgrpo.records import Credit, Node, Pivot, Tree

Keys = TypeVar("Keys", bound=PivotExplore | AllocateExplore | PrefixExplore)
PivotKeys = TypeVar("PivotKeys", bound=PivotExplore)


@dataclass(frozen=True)
class Segmented(Generic[Keys]):
    """Base for strategies that cut rollouts into segments."""

    config: Keys
    segment: Segmenter
    scale: Scale = "none"

    @classmethod
    def build(cls, config: Keys, context: Context) -> Self:
        return cls(config, build_segmenter(config.segments, context.tokenizer), context.scale)


@dataclass(frozen=True)
class PivotStrategy(Segmented[PivotKeys], Stateless, ABC):
    """G rollouts from the prompt; then pivots drawn from Q in every expanded rollout, with K branches each.

    Siblings are compared with each other, in both streams (credit/siblings.py).
    """

    @abstractmethod
    def log_q(self, node: Node, offsets: Sequence[int], ratios: Sequence[float], state: State) -> np.ndarray:
        """Candidates of a rollout, by offset and depth ratio `[n]` → log Q `[n]`, normalised; all -inf: no pivot here."""

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        if not tree.pivots:
            return [main_pivot(self.config.num_rollouts)]
        if len(tree.pivots) > 1 or not self.config.num_pivots:
            return []
        return self._second_round(tree, state, limits, random)

    def _second_round(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        """`num_pivots` candidates of every expanded rollout, drawn from Q.

        A rollout without candidates gets none: its prompt leaves no room, or no state is
        allowed by `root_pivot` and `max_ratio`.
        """
        config = self.config
        pivots: list[Pivot] = []
        rollouts = list(tree.stream("main"))
        if config.expand == "unsolved" and any(node.outcome > config.success_threshold for _, node in rollouts):
            return []
        for index, node in rollouts:
            if config.expand == "failed" and node.outcome > config.success_threshold:
                continue
            offsets, ratios = candidates(
                node_ends(self.segment, node), room=limits.response(tree), root=config.root_pivot, deepest=config.max_ratio
            )
            if not offsets:
                continue
            log_q = self.log_q(node, offsets, ratios, state)
            q = np.exp(log_q)
            for i in draw_without_replacement(log_q, config.num_pivots, random):
                pivots.append(
                    Pivot(
                        parent=index, offset=offsets[i], num_branches=config.branches_per_pivot, ratio=ratios[i],
                        candidates=tuple(offsets), q=tuple(float(p) for p in q),
                    )
                )  # fmt: skip
        return pivots

    def returns(self, level: int) -> bool:
        return level == 0 and self.config.num_pivots > 0

    def credit(self, tree: Tree) -> Credit:
        return sibling_credit(tree, self.scale)


def candidates(ends: Sequence[int], *, room: int, root: bool = True, deepest: float = 1.0) -> tuple[list[int], list[float]]:
    """Offsets and depth ratios of the states that may become pivots.

    Args:
        ends: ascending ends of the segments; the last one is the end of the rollout.
        room: longest response; a state must leave space for at least one more token.
        root: include the prompt itself (index 0 of the chain, ratio 1 / len(chain)).
        deepest: largest depth ratio.

    Example: ends [10, 20, 30, 40] make a chain of 5; candidates at 0, 10, 20, 30 with r = .2, .4, .6, .8.
    """
    chain = [0, *ends]
    keep = [i for i in range(0 if root else 1, len(chain) - 1) if chain[i] < room and (i + 1) / len(chain) <= deepest]
    return [chain[i] for i in keep], [(i + 1) / len(chain) for i in keep]


def draw_without_replacement(log_q: np.ndarray, count: int, random: np.random.Generator) -> list[int]:
    """Draw distinct indices one after another, each in proportion to Q among those left; never one with Q = 0.

    By the Gumbel trick: the order of `log q + Gumbel noise`, from the top, has exactly this distribution.
    """
    noisy = log_q + random.gumbel(size=len(log_q))
    return [int(i) for i in np.argsort(-noisy, kind="stable")[: min(count, np.isfinite(log_q).sum())]]
