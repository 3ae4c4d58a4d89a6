"""Credit by group means: nodes are compared with their siblings, or with all rollouts of the prompt, and train own tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepgrpo.credit.group import Scale, centre, centre_parts
from deepgrpo.records import Credit, CreditSpan, Group, Node, Stream, Tree


def advantages_of(siblings: Sequence[Node], scale: Scale = "none") -> np.ndarray:
    """`[N]` advantages of the nodes of a group: their rewards centred, or with "part_std" each part of them by itself."""
    if scale != "part_std" or not siblings[0].score.parts:
        return centre([node.reward for node in siblings], scale)
    names = siblings[0].score.parts
    weights = {name: part.weight for name, part in names.items()}
    return centre_parts({name: [node.score.parts[name].value for node in siblings] for name in names}, weights)


def sibling_credit(tree: Tree, scale: Scale = "none", stream: Stream | None = None) -> Credit:
    """Advantage of every node relative to its siblings at the same pivot, in the pivot's stream.

    The G rollouts of the prompt are the siblings at the first pivot, so this is GRPO's group advantage in the main stream
    and DEEP-GRPO's local advantage in the branch stream. `stream` limits the credit to one of the two.

    Example: the tree of records.py. The main rewards (0, 1) give (-1/2, 1/2) and the branch rewards (1, 0) give
    (1/2, -1/2). Nodes 2 and 3 train 2 and 3 tokens, never the prefix.
    """
    spans: list[CreditSpan] = []
    groups: list[Group] = []
    for index, pivot in enumerate(tree.pivots):
        if stream is not None and pivot.stream != stream:
            continue
        siblings = tree.children(index)
        nodes = [tree.nodes[node] for node in siblings]
        groups.append(Group(pivot.stream, tuple(node.reward for node in nodes)))
        for node, advantage in zip(siblings, advantages_of(nodes, scale), strict=True):
            spans.append(CreditSpan(node, 0, len(tree.nodes[node].tokens), float(advantage), pivot.stream))
    return Credit(tuple(spans), tuple(groups))


def pooled_credit(tree: Tree, scale: Scale = "none", keep: int | None = None) -> Credit:
    """Advantage of every main rollout relative to all main rollouts of the prompt, whatever the round that sampled them.

    Args:
        keep: train at most this many, the first of either outcome alternately; the mean is that of all.

    Example: rewards (0, 0) of a first round and (1, 0) of a second have the mean 1/4; with `keep` = 2 the rollouts 0 and 2 are
    trained, with -1/4 and 3/4.
    """
    nodes = [index for index, _ in tree.stream("main")]
    rewards = tuple(tree.nodes[index].reward for index in nodes)
    advantages = dict(zip(nodes, map(float, advantages_of([tree.nodes[node] for node in nodes], scale)), strict=True))
    if keep is not None and keep < len(nodes):
        above = [index for index in nodes if advantages[index] > 0]
        below = [index for index in nodes if advantages[index] <= 0]
        few, many = sorted((above, below), key=len)
        taken = min(len(few), keep // 2)
        nodes = sorted(few[:taken] + many[: keep - taken])
    spans = tuple(CreditSpan(index, 0, len(tree.nodes[index].tokens), advantages[index], "main") for index in nodes)
    return Credit(spans, (Group("main", rewards),))
