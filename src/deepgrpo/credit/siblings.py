"""Credit by siblings: nodes sampled at one pivot are compared, and each is trained on its own tokens."""

from __future__ import annotations

from deepgrpo.credit.group import Scale, centre
from deepgrpo.records import Credit, CreditSpan, Group, Tree


def sibling_credit(tree: Tree, scale: Scale = "none") -> Credit:
    """Advantage of every node relative to its siblings at the same pivot, in the pivot's stream.

    The G rollouts of the prompt are the siblings at the first pivot, so this is GRPO's group advantage in the main stream
    and DEEP-GRPO's local advantage in the branch stream.

    Example: the tree of records.py. The main rewards (0, 1) give (-1/2, 1/2) and the branch rewards (1, 0) give
    (1/2, -1/2). Nodes 2 and 3 train 2 and 3 tokens, never the prefix.
    """
    spans: list[CreditSpan] = []
    groups: list[Group] = []
    for index, pivot in enumerate(tree.pivots):
        siblings = tree.children(index)
        rewards = tuple(tree.nodes[node].reward for node in siblings)
        groups.append(Group(pivot.stream, rewards))
        for node, advantage in zip(siblings, centre(rewards, scale), strict=True):
            spans.append(CreditSpan(node, 0, len(tree.nodes[node].tokens), float(advantage), pivot.stream))
    return Credit(tuple(spans), tuple(groups))
