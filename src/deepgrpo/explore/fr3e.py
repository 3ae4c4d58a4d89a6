"""FR3E (arXiv:2507.04984): fresh rollouts from the least likely tokens of a rollout that succeeded and one that failed.

    bases      the first success and the first failure among `num_bases` rollouts; analysed, not trained
    states     of a base, j = 0: the prompt; j = 1..: before each of its `num_anchors` tokens of lowest probability, in order
    rollouts   n from every state
    V_j        share of successes among them
    ΔV_0       1 - V_0              ΔV_j = V_j - V_{j-1}
    advantage  (R - mean of the state's n) / exp(ΔV_j)

Rollouts count less where a step gained much, and more where the base went wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.config import FR3EExplore
from deepgrpo.credit.siblings import advantages_of
from deepgrpo.explore.base import Limits, Scaled, State, Stateless, main_pivot
from deepgrpo.records import ROOT, Credit, CreditSpan, Group, Node, Pivot, Tree

SHARPNESS = 1.5
"""Exponent of |ΔV| with `explore.sharpen`, as in the released code."""


@dataclass(frozen=True)
class FR3EStrategy(Scaled[FR3EExplore], Stateless):
    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        if not tree.pivots:
            return [main_pivot(self.config.num_bases)]
        if len(tree.pivots) > 1:
            return []
        pivots: list[Pivot] = []
        for index in self._bases(tree):
            node = tree.nodes[index]
            pivots.append(main_pivot(self.config.rollouts_per_state))
            for offset in anchors(node, self.config.num_anchors, room=limits.response(tree)):
                ratio = (offset + 1) / (len(node.tokens) + 1)  # as if each token were a segment
                pivots.append(Pivot(index, offset, self.config.rollouts_per_state, ratio=ratio))
        return pivots

    def _bases(self, tree: Tree) -> list[int]:
        """The first rollout that succeeded and the first that failed, in sampling order."""
        succeeded = [self._success(tree.nodes[index]) for index in tree.children(0)]
        return sorted(succeeded.index(outcome) for outcome in set(succeeded))

    def _success(self, node: Node) -> bool:
        return node.outcome > self.config.success_threshold

    def returns(self, level: int) -> bool:
        return level == 0

    def credit(self, tree: Tree) -> Credit:
        """Credit in one stream, as published; each group is labelled by the start of its rollouts, prompt or anchor."""
        spans: list[CreditSpan] = []
        groups: list[Group] = []
        for states in _chains(tree):
            siblings = [tree.children(pivot) for pivot in states]
            rewards = [tuple(tree.nodes[node].reward for node in group) for group in siblings]
            rollouts = [[tree.nodes[node] for node in group] for group in siblings]
            advantages = [advantages_of(group, self.scale) for group in rollouts]
            values = [self._value(group, own) for group, own in zip(rollouts, advantages, strict=True)]
            factors = np.exp(value_steps(values, sharpen=self.config.sharpen))
            for pivot, group, of_state, own, factor in zip(states, siblings, rewards, advantages, factors, strict=True):
                groups.append(Group(tree.pivots[pivot].stream, of_state))
                for node, advantage in zip(group, own / factor, strict=True):
                    spans.append(CreditSpan(node, 0, len(tree.nodes[node].tokens), float(advantage), "main"))
        return Credit(tuple(spans), tuple(groups))

    def _value(self, rollouts: Sequence[Node], advantages: np.ndarray) -> float:
        """V of a state, from its rollouts and their advantages."""
        if self.config.values == "positive_advantage":
            return float(np.mean(advantages > 0))
        return float(np.mean([self._success(node) for node in rollouts]))


def anchors(node: Node, count: int, *, room: int) -> list[int]:
    """Offsets of the `count` sampled tokens of lowest probability, ascending; ties go to the earlier token.

    Never the first token: the state before it is the prompt, which is a state of its own. Fewer if the rollout is shorter.

    Args:
        node: a rollout from the prompt.
        room: longest response; an anchor must leave space for at least one token.
    """
    offsets = node.sampled_places(1, min(len(node.tokens), room))
    return sorted(sorted(offsets, key=lambda offset: node.logprobs[offset])[:count])


def value_steps(values: Sequence[float], *, sharpen: bool = False) -> np.ndarray:
    """ΔV of the states of a base: `1 - V_0`, then `V_j - V_{j-1}`.

    Args:
        values: `[J + 1]` of the prompt and the anchors, in order.
        sharpen: sign(ΔV) · |ΔV|^1.5 / Σ |ΔV|^1.5 instead; all zero if no value ever changes.

    Example: V = 1/2, 3/4, 1/4 give 1/2, 1/4, -1/2.
    """
    steps = np.diff(np.asarray(values, dtype=np.float64), prepend=0.0)
    steps[0] = 1.0 - values[0]
    if sharpen:
        size = np.abs(steps) ** SHARPNESS
        steps = np.sign(steps) * size / (size.sum() or 1.0)
    return steps


def _chains(tree: Tree) -> Iterator[list[int]]:
    """Pivots of each expanded base: the prompt's first, then those of its anchors. The bases' own pivot is left out."""
    chain: list[int] = []
    for index, pivot in enumerate(tree.pivots[1:], start=1):
        if pivot.parent == ROOT and chain:
            yield chain
            chain = []
        chain.append(index)
    if chain:
        yield chain
