"""SPO-tree (arXiv:2505.23564): a uniform tree of short segments, each credited with the change of value along it.

    segment length M, branching (6, 6, 6):   prompt ─► 6 segments of M tokens ─► 6 each ─► 6 each, to their end
    V(node)   = mean reward of the responses below it
    A(edge)   = V(child) - V(parent)                                             advantage = "parent"

A node that ends before M tokens is a response, without children. Edges without a change of value carry no signal. TreeRPO's
relative advantage is a switch: V bottom up as the mean over children, each child against its siblings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from deepgrpo.config import SPOTreeExplore
from deepgrpo.credit.group import Scale, centre
from deepgrpo.explore.base import Limits, Scaled, State, Stateless
from deepgrpo.records import ROOT, Credit, CreditSpan, Group, Pivot, Tree


@dataclass(frozen=True)
class SPOTreeStrategy(Scaled[SPOTreeExplore], Stateless):
    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        if not tree.pivots:
            return [self._pivot(ROOT, 0, level=0)]
        continued = {pivot.parent for pivot in tree.pivots}
        return [
            self._pivot(index, len(node.tokens), level=len(tree.spans(index)))
            for index, node in enumerate(tree.nodes)
            if not node.complete and index not in continued
        ]

    def _pivot(self, parent: int, offset: int, *, level: int) -> Pivot:
        last = level == len(self.config.branching) - 1
        return Pivot(
            parent, offset, self.config.branching[level], "main", max_tokens=None if last else self.config.segment_tokens
        )

    def returns(self, level: int) -> bool:
        return level < len(self.config.branching) - 1

    def credit(self, tree: Tree) -> Credit:
        return segment_credit(tree, self.config.advantage, self.scale)


def segment_credit(tree: Tree, advantage: Literal["parent", "siblings"] = "parent", scale: Scale = "none") -> Credit:
    """Credit of every edge of a segment tree; each node is trained once, in the stream of its pivot.

    Args:
        tree: a tree in which every segment was continued at its end.
        advantage: "parent": `V(child) - V(parent)`, V the mean reward of the responses below. "siblings": `V(child) -
            mean V(siblings)`, V(node) the mean V of its children; the two differ only where some paths end early.
        scale: for "siblings", as in `centre`.
    """
    below: dict[int, list[int]] = {}
    for index, pivot in enumerate(tree.pivots):
        below.setdefault(pivot.parent, []).extend(tree.children(index))
    responses: dict[int, tuple[float, int]] = {}  # node → sum of the rewards below it, and their number
    by_children: dict[int, float] = {}
    for index in range(len(tree.nodes) - 1, ROOT - 1, -1):  # children come after their parents
        children = below.get(index, [])
        assert children or tree.nodes[index].complete, f"segment {index} of prompt {tree.prompt.id!r} was never continued"
        if children:
            sums = [responses[child] for child in children]
            responses[index] = (sum(total for total, _ in sums), sum(count for _, count in sums))
            by_children[index] = sum(by_children[child] for child in children) / len(children)
        else:
            responses[index] = (tree.nodes[index].reward, 1)
            by_children[index] = tree.nodes[index].reward
    by_responses = {index: total / count for index, (total, count) in responses.items()}
    values = by_responses if advantage == "parent" else by_children

    spans: list[CreditSpan] = []
    groups: list[Group] = []
    for index, pivot in enumerate(tree.pivots):
        siblings = tree.children(index)
        own = tuple(values[node] for node in siblings)
        groups.append(Group(pivot.stream, own))
        gains = [v - values[pivot.parent] for v in own] if advantage == "parent" else centre(own, scale).tolist()
        for node, gain in zip(siblings, gains, strict=True):
            spans.append(CreditSpan(node, 0, len(tree.nodes[node].tokens), gain, pivot.stream))
    return Credit(tuple(spans), tuple(groups))
