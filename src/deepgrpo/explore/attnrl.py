"""AttnRL (arXiv:2509.26628): branch at the earliest steps that the rest of the rollout keeps attending to.

    rollouts    `num_rollouts` from the prompt
    expanded    round(num_rollouts · exp(-share of successes)) of them: first those of the rarer outcome
    candidates  steps whose influence (FCI, model/signals.py) is among the top `top_share` of their rollout, not the first
    pivots      the earliest `num_pivots` candidates, each at the *start* of its step, so that the step is resampled
    advantage   TreeRL's, over the whole tree (credit/tree_values.py)

Prompts whose rollouts all succeed are expanded only if the influence in them is above its running mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.config import AttnRLExplore
from deepgrpo.credit.tree_values import treerl_credit
from deepgrpo.explore.base import ATTENTION, Context, Limits, Signal, State, main_pivot
from deepgrpo.explore.segments import Segmenter, build_segmenter, node_ends
from deepgrpo.records import Credit, Node, Pivot, Tree


@dataclass(frozen=True)
class AttnRLStrategy:
    config: AttnRLExplore
    segment: Segmenter

    @classmethod
    def build(cls, config: AttnRLExplore, context: Context) -> AttnRLStrategy:
        return cls(config, build_segmenter(config.segments, context.tokenizer))

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({Signal(ATTENTION, self.segment, self.config.lag)})

    def initial_state(self) -> State:
        return {"prompts": 0, "mean": 0.0, "solved": 0, "left_out": 0}

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        if not tree.pivots:
            return [main_pivot(self.config.num_rollouts)]
        if len(tree.pivots) > 1:
            return []
        pivots: list[Pivot] = []
        for index in self._expanded(tree, state, random):
            node = tree.nodes[index]
            starts, influence = self._steps(node)
            for step in choose_steps(
                starts, influence, self.config.num_pivots, top_share=self.config.top_share, spacing=self.config.spacing,
                room=limits.response(tree),
            ):  # fmt: skip
                ratio = (step + 1) / (len(starts) + 1)  # state before the step, in the chain: root, step ends
                pivots.append(Pivot(index, starts[step], self.config.branches_per_pivot, ratio=ratio))
        return pivots

    def _expanded(self, tree: Tree, state: State, random: np.random.Generator) -> list[int]:
        """Rollouts that get pivots, in order."""
        rollouts = list(tree.stream("main"))
        solved = [index for index, node in rollouts if node.outcome > self.config.success_threshold]
        failed = [index for index, node in rollouts if node.outcome <= self.config.success_threshold]
        if not failed and state["prompts"] and self._influence(tree) <= state["mean"]:
            return []
        count = num_expanded(len(solved), len(rollouts))
        rare, common = (failed, solved) if len(solved) >= len(failed) else (solved, failed)
        # the rarer outcome never exceeds `count`; the other fills up
        filled = random.choice(common, size=count - len(rare), replace=False)
        return sorted([*rare, *map(int, filled)])

    def _steps(self, node: Node) -> tuple[list[int], list[float]]:
        """Start offsets of a rollout's steps, and the influence of each."""
        starts = [0, *node_ends(self.segment, node)[:-1]]
        return starts, [node.signals[ATTENTION][start] for start in starts]

    def _influence(self, tree: Tree) -> float:
        """Mean over the rollouts of the mean influence of their steps."""
        return float(np.mean([np.mean(self._steps(tree.nodes[index])[1]) for index in tree.children(0)]))

    def returns(self, level: int) -> bool:
        return level == 0

    def credit(self, tree: Tree) -> Credit:
        return treerl_credit(tree)

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        """Update the running mean of the influence in prompts whose rollouts all succeed; count those left out of expansion."""
        prompts, mean, solved, left_out = state["prompts"], state["mean"], 0, 0
        for tree in trees:
            if any(node.outcome <= self.config.success_threshold for node in (tree.nodes[i] for i in tree.children(0))):
                continue
            solved += 1
            left_out += len(tree.pivots) == 1
            prompts += 1
            mean += (self._influence(tree) - mean) / prompts
        return {"prompts": prompts, "mean": mean, "solved": solved, "left_out": left_out}

    def report(self, state: State) -> dict[str, float]:
        return {
            "attnrl/influence_mean": float(state["mean"]),
            "attnrl/solved_prompts": float(state["solved"]),
            "attnrl/solved_left_out": float(state["left_out"]),
        }


def num_expanded(successes: int, rollouts: int) -> int:
    """`round(n · exp(-successes / n))`. With n = 6: 6, 5, 4, 4, 3, 3, 2 for 0 to 6 successes."""
    return round(rollouts * math.exp(-successes / rollouts))


def choose_steps(
    starts: Sequence[int], influence: Sequence[float], count: int, *, top_share: float, spacing: int, room: int
) -> list[int]:
    """Indices of the steps to resample, ascending.

    The earliest steps whose influence is above 0 and at or above its quantile `1 - top_share` in the rollout; never the
    first, which starts at the prompt. Steps nearer than `spacing` tokens to the start or to a chosen step are skipped. If
    too few remain, the earliest other steps fill up; no step is chosen twice.

    Args:
        starts: `[m]` ascending, the first is 0.
        influence: `[m]`, at least 0.
        room: longest response; a step must begin before it.
    """
    threshold = np.quantile(np.asarray(influence, dtype=np.float64), 1.0 - top_share)
    later = [k for k in range(1, len(starts)) if starts[k] < room]
    chosen: list[int] = []
    for k in later:
        if len(chosen) == count:
            break
        if influence[k] > 0 and influence[k] >= threshold:
            if all(starts[k] - earlier >= spacing for earlier in (0, *(starts[c] for c in chosen))):
                chosen.append(k)
    others = [k for k in later if k not in chosen]
    return sorted([*chosen, *others[: count - len(chosen)]])
