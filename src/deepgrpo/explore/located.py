"""Located (after SRPO, arXiv:2605.25507): ask the policy for the first wrong step of a failed rollout, and go on before it.

    question    the rollout's numbered segments in a prompt of its own (train/critique.py), one answer per failed rollout
    pivot       the state before the named step: Q = 1
    no answer   one that names no step, finds none wrong, or names a state that is no candidate: `fallback`

Candidates, expanded rollouts, branches and credit are those of `deep`; the answers are sampled tokens and are billed. Its
control is `random`, which draws from the same candidates and asks nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.config import LocatedExplore
from deepgrpo.explore.base import LOCATED, UNASKED, UNREAD, Critique, Signal, State
from deepgrpo.explore.pivots import PivotStrategy
from deepgrpo.explore.random import log_uniform
from deepgrpo.records import Node, Tree

OUTCOMES = ("asked", "named", "none_wrong", "unread", "unasked")
"""Counts: questions; answers that name a step, that find none wrong, that cannot be read; rollouts too long to ask about."""


@dataclass(frozen=True)
class LocatedStrategy(PivotStrategy[LocatedExplore]):
    @property
    def signals(self) -> frozenset[Signal]:  # type: ignore[override]
        config = self.config
        critique = Critique(
            LOCATED, self.segment, question=config.question, step=config.step, answer_tokens=config.answer_tokens,
            temperature=config.answer_temperature, unsolved=config.expand == "unsolved",
            most_reward=config.success_threshold if config.expand != "all" else math.inf,
        )  # fmt: skip
        return frozenset({critique})

    def initial_state(self) -> State:
        return dict.fromkeys((*OUTCOMES, "fallback"), 0)

    def log_q(self, node: Node, offsets: Sequence[int], ratios: Sequence[float], state: State) -> np.ndarray:
        start = named_step(node)
        if start in offsets:
            return _only(offsets.index(start), len(offsets))
        if self.config.fallback == "random":
            return log_uniform(ratios)
        return _only(0 if self.config.fallback == "first" else None, len(offsets))

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        """Count the answers of the step, and the pivots that were not placed by one."""
        counts = dict.fromkeys((*OUTCOMES, "fallback"), 0)
        for tree in trees:
            for _, node in tree.stream("main"):
                if LOCATED in node.signals:
                    counts[_outcome(node)] += 1
            for pivot in tree.pivots:
                if pivot.stream == "branch":
                    counts["fallback"] += named_step(tree.nodes[pivot.parent]) != pivot.offset
        counts["asked"] = counts["named"] + counts["none_wrong"] + counts["unread"]
        return counts

    def report(self, state: State) -> dict[str, float]:
        return {f"located/{name}": float(count) for name, count in state.items()}


def named_step(node: Node) -> int | None:
    """Own tokens before the step that the policy named; None if it named none."""
    values = node.signals[LOCATED]
    return values.index(1.0) if 1.0 in values else None


def _outcome(node: Node) -> str:
    first = node.signals[LOCATED][0]
    if first in (UNREAD, UNASKED):
        return "unread" if first == UNREAD else "unasked"
    return "none_wrong" if named_step(node) is None else "named"


def _only(place: int | None, count: int) -> np.ndarray:
    """Log Q `[count]` of one certain candidate; all -inf without one."""
    log_q = np.full(count, -np.inf)
    if place is not None:
        log_q[place] = 0.0
    return log_q
