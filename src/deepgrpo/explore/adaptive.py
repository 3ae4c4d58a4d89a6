"""Adaptive root sampling (Reinforce-Ada, arXiv:2510.04996): more rollouts where a prompt's outcomes still agree.

    round        `round_rollouts` rollouts from the prompt
    next round   until `min_successes` and `min_failures` are reached, or `max_rollouts` are spent
    advantage    all rollouts of the prompt are one group (credit/siblings.py)

An answer to prompts without signal that needs no pivots: a control for every strategy that branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.config import AdaptiveExplore
from deepgrpo.credit.siblings import pooled_credit
from deepgrpo.explore.base import Limits, Scaled, Signal, State, main_pivot
from deepgrpo.records import Credit, Pivot, Tree


@dataclass(frozen=True)
class AdaptiveStrategy(Scaled[AdaptiveExplore]):
    signals: frozenset[Signal] = frozenset()

    def initial_state(self) -> State:
        return {"rollouts": 0.0, "spent": 0.0}

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        count = sum(1 for _ in tree.stream("main"))
        left = self.config.max_rollouts - count
        if left <= 0 or (count and self._is_enough(tree)):
            return []
        return [main_pivot(min(self.config.round_rollouts, left))]

    def _is_enough(self, tree: Tree) -> bool:
        outcomes = [node.outcome for _, node in tree.stream("main")]
        successes = sum(outcome > self.config.success_threshold for outcome in outcomes)
        return successes >= self.config.min_successes and len(outcomes) - successes >= self.config.min_failures

    def returns(self, level: int) -> bool:
        return False

    def credit(self, tree: Tree) -> Credit:
        return pooled_credit(tree, self.scale, self.config.keep_rollouts)

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        """Mean rollouts per prompt of the step, and the share of prompts that spent their allowance in vain."""
        counts = [sum(1 for _ in tree.stream("main")) for tree in trees]
        vain = [not self._is_enough(tree) for tree in trees]
        return {"rollouts": float(np.mean(counts)), "spent": float(np.mean(vain))} if trees else state

    def report(self, state: State) -> dict[str, float]:
        return {"adaptive/rollouts": float(state["rollouts"]), "adaptive/spent": float(state["spent"])}
