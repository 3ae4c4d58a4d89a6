"""Credit by values along a tree: the value of a piece of text is the mean reward of the responses below it.

    V(n)  = mean reward of the responses below n
    A(n)  = [(V(n) - V(root)) + (V(n) - V(parent of n))] / sqrt(number of responses below n)      TreeRL (arXiv:2506.11902)

A node owns a whole continuation, so it is cut where others branch off. A *part* is a piece between two cuts. Every response
that continues at its end contains all of it, so all of its tokens have one value.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deepgrpo.records import ROOT, Credit, CreditSpan, Group, Tree

ZERO_LOCAL = 1e-8
"""Smaller changes of value count as zero."""


@dataclass(frozen=True, slots=True)
class PathPart:
    """Tokens [start, end) of a node, between two branchings.

    Example: node 0 of records.py has the parts [0, 4) and [4, 6); the first has responses 0, 2 and 3 below it.
    """

    node: int
    start: int
    end: int
    parent: int
    """Index of the part before this one on the path, or ROOT."""
    leaves: tuple[int, ...]
    """Nodes whose responses end in this part or below, ascending."""


def tree_parts(tree: Tree) -> list[PathPart]:
    """Parts of a tree; each token is in exactly one. A part comes after its parent, and a node's parts are in order.

    A branch before the first token of a node has that node's parent part as its parent.
    """
    cuts: dict[int, set[int]] = {}
    for pivot in tree.pivots:
        cuts.setdefault(pivot.parent, set()).add(pivot.offset)
    reached = {(ROOT, 0): ROOT}  # (node, offset) → part that ends there
    spans: list[tuple[int, int, int, int]] = []
    for index, node in enumerate(tree.nodes):
        parent, start = reached[node.parent, node.offset], 0
        reached[index, 0] = parent
        for end in sorted({*cuts.get(index, ()), len(node.tokens)} - {0}):
            spans.append((index, start, end, parent))
            parent, start = len(spans) - 1, end
            reached[index, end] = parent
    leaves: list[list[int]] = [[] for _ in spans]
    for index, node in enumerate(tree.nodes):
        part = reached[index, len(node.tokens)] if node.complete else ROOT
        while part != ROOT:
            leaves[part].append(index)
            part = spans[part][3]
    return [PathPart(*span, tuple(below)) for span, below in zip(spans, leaves, strict=True)]


def treerl_credit(
    tree: Tree, *, leaf_values: Literal["reward", "leave_one_out"] = "reward",
    token_mean: Literal["keep", "remove"] = "keep", node_values: Literal["mean", "sum"] = "mean",
    zero_local: Literal["keep", "copy"] = "keep", kept: Collection[int] | None = None,
) -> Credit:  # fmt: skip
    """TreeRL's advantage of every part of a tree: one stream, one group, every token once.

    The defaults are the paper's formula. Each switch is a step in which the released code departs from it (docs/details.md
    30). With R the value of a response, L(n) the responses below part n, and L'(n) the kept ones among them:

        R          reward; leave_one_out: reward minus the mean of all others'
        R          remove: minus the mean of R over the tokens of all responses (shared tokens counted once per response)
        S(n)       mean: mean of R over L(n); sum: Σ of R over L(n) / sqrt(|L'(n)|)
        local(n)   S(n) - S(parent); copy: where that is zero, local(parent)
        A(n)       (S(n) - S(root)) + local(n); mean: divided by sqrt(|L'(n)|)

    Args:
        tree: with at least one response.
        node_values: "sum" needs values centred by one of the two switches before it.
        kept: nodes whose responses are trained; None: all. A part without a kept response below has no span, but its
            responses count in the values of others.

    Example: the tree of records.py, rewards 0, 1, 1, 0 of nodes 0 to 3. V(root) = 1/2. The first part of node 0 has
    V = 1/3 and A = -1/3 / sqrt(3) = -0.19245; its second part has V = 0 and A = -1/2 - 1/3 = -5/6.
    """
    parts = tree_parts(tree)
    ends = [index for index, node in enumerate(tree.nodes) if node.complete]
    rewards = [tree.nodes[index].reward for index in ends]
    values = dict(zip(ends, _leaf_values(tree, ends, leaf_values, token_mean), strict=True))
    trained = set(ends) if kept is None else set(kept)

    def worth(leaves: Collection[int]) -> float:
        """S of a set of responses."""
        total = float(sum(values[leaf] for leaf in leaves))
        return total / (len(leaves) if node_values == "mean" else len(trained.intersection(leaves)) ** 0.5)

    root = worth(ends)
    worths: dict[int, float] = {ROOT: root}
    changes: dict[int, float] = {}
    spans: list[CreditSpan] = []
    for index, part in enumerate(parts):
        count = len(trained.intersection(part.leaves))
        if not count:
            continue
        worths[index] = worth(part.leaves)
        changes[index] = worths[index] - worths[part.parent]
        if zero_local == "copy" and abs(changes[index]) < ZERO_LOCAL and part.parent != ROOT:
            changes[index] = changes[part.parent]
        advantage = worths[index] - root + changes[index]
        if node_values == "mean":
            advantage /= count**0.5
        spans.append(CreditSpan(part.node, part.start, part.end, advantage, "main"))
    return Credit(tuple(spans), (Group("main", tuple(rewards)),))


def _leaf_values(
    tree: Tree, ends: list[int], leaf_values: Literal["reward", "leave_one_out"], token_mean: Literal["keep", "remove"]
) -> np.ndarray:
    """`[n]` values R of the responses that end in the given nodes; all exactly zero where their rewards agree."""
    rewards = np.array([tree.nodes[index].reward for index in ends], dtype=np.float64)
    if rewards.max() == rewards.min():
        return np.zeros_like(rewards)  # only differences of values count, and rounding must not create any
    # with n responses, r minus the mean of the others is n / (n - 1) times r minus the mean of all
    values = rewards if leaf_values == "reward" else (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)
    if token_mean == "remove":
        lengths = [
            sum(len(tree.nodes[node].sampled_places(start, end)) for node, start, end in tree.spans(index)) for index in ends
        ]
        values = values - np.average(values, weights=lengths)
    return values
