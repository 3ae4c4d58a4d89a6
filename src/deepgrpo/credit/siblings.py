"""Credit by group means: nodes are compared with their siblings, or with all rollouts of the prompt, and train own tokens."""

from __future__ import annotations

from deepgrpo.credit.group import Scale, centre
from deepgrpo.records import Credit, CreditSpan, Group, Stream, Tree


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
        rewards = tuple(tree.nodes[node].reward for node in siblings)
        groups.append(Group(pivot.stream, rewards))
        for node, advantage in zip(siblings, centre(rewards, scale), strict=True):
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
    advantages = dict(zip(nodes, map(float, centre(rewards, scale)), strict=True))
    if keep is not None and keep < len(nodes):
        above = [index for index in nodes if advantages[index] > 0]
        below = [index for index in nodes if advantages[index] <= 0]
        few, many = sorted((above, below), key=len)
        taken = min(len(few), keep // 2)
        nodes = sorted(few[:taken] + many[: keep - taken])
    spans = tuple(CreditSpan(index, 0, len(tree.nodes[index].tokens), advantages[index], "main") for index in nodes)
    return Credit(spans, (Group("main", rewards),))
