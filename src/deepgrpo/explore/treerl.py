"""TreeRL (arXiv:2506.11902): branch where the policy was least certain, and value every part of the tree.

    M rollouts from the prompt, each the trunk of a tree
    L rounds: in each tree the N most surprising tokens are resampled, with T continuations from before each
    surprisal of a token = -log p(token) under the distribution it was sampled from
    advantage of a part: from the rewards of the responses below it (credit/tree_values.py)

(M, N, L, T) = (6, 2, 1, 2) grows 6 + 6 · 2 · 1 · 2 = 30 responses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from deepgrpo import rng
from deepgrpo.config import TreeRLExplore
from deepgrpo.credit.tree_values import treerl_credit
from deepgrpo.explore.base import Context, Limits, State, Stateless, main_pivot
from deepgrpo.records import ROOT, Credit, Node, Pivot, Tree


@dataclass(frozen=True)
class TreeRLStrategy(Stateless):
    config: TreeRLExplore
    text_of: Callable[[int], str]
    """The text of a token."""

    @classmethod
    def build(cls, config: TreeRLExplore, context: Context) -> TreeRLStrategy:
        # context.scale is "none": there is no group to scale by, and the recipe is checked for it
        texts: dict[int, str] = {}

        def text_of(token: int) -> str:
            if token not in texts:
                texts[token] = context.tokenizer.decode([token])
            return texts[token]

        return cls(config, text_of)

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        if not tree.pivots:
            return [main_pivot(self.config.num_rollouts)]
        room = limits.response(tree)
        # a tree does not store the round of a pivot, but the choice is deterministic and can be repeated
        rounds, planned = 0, 1
        while planned < len(tree.pivots):
            before = [node for node in tree.nodes if node.pivot < planned]
            again = self._round(replace(tree, nodes=tuple(before), pivots=tree.pivots[:planned]), room)
            assert again, f"prompt {tree.prompt.id!r}: this tree was grown with other settings"
            planned += len(again)
            rounds += 1
        return self._round(tree, room) if rounds < self.config.num_rounds else []

    def _round(self, tree: Tree, room: int) -> list[Pivot]:
        """The N most surprising tokens of each rollout's tree; ties go to the first in sampling order."""
        taken = {(pivot.parent, pivot.offset) for pivot in tree.pivots}
        found: dict[int, list[tuple[float, int, int, float]]] = {}
        trunk_of: list[int] = []
        for index, node in enumerate(tree.nodes):
            trunk_of.append(index if node.parent == ROOT else trunk_of[node.parent])
            depth = len(tree.response(node.parent, node.offset))
            length = depth + len(node.tokens)
            for offset in self._branchable(node, depth, room):
                # the state before a branch's first token is its pivot
                if (index, offset) not in taken and not (offset == 0 and node.parent != ROOT):
                    ratio = (depth + offset + 1) / (length + 1)  # as if each token were a segment
                    found.setdefault(trunk_of[index], []).append((node.logprobs[offset], index, offset, ratio))
        return [
            Pivot(index, offset, self.config.branches_per_pivot, ratio=ratio)
            for trunk in sorted(found)
            for _, index, offset, ratio in sorted(found[trunk])[: self.config.num_pivots]
        ]

    def _branchable(self, node: Node, depth: int, room: int) -> list[int]:
        """Offsets of the tokens that may be resampled; `depth`: tokens of the response before the node's."""
        words = tuple(word.lower() for word in self.config.mask_after)
        length = depth + len(node.tokens)
        first, last = self.config.skip_first * length, min(length - self.config.skip_last, room)
        offsets: list[int] = []
        for offset in node.sampled_places():
            if first <= depth + offset < last:
                offsets.append(offset)
            if words and any(word in self.text_of(node.tokens[offset]).lower() for word in words):
                break
        return offsets

    def returns(self, level: int) -> bool:
        return level < self.config.num_rounds

    def credit(self, tree: Tree) -> Credit:
        config = self.config
        kept = None if config.keep_leaves is None else draw_leaves(tree, config.keep_leaves, config.success_threshold)
        return treerl_credit(
            tree, leaf_values=config.leaf_values, token_mean=config.token_mean, node_values=config.node_values,
            zero_local=config.zero_local, kept=kept,
        )  # fmt: skip


def draw_leaves(tree: Tree, count: int, success_threshold: float) -> list[int]:
    """Nodes of `count` responses drawn at random, with at least one success if there is any; all nodes if they are fewer.

    One success is drawn first, then the others from the rest. The sampled tokens are the address of the draw: credit has no
    seed, and the same tree must always get the same credit.
    """
    leaves = [index for index, node in enumerate(tree.nodes) if node.complete]
    random = rng.generator("kept leaves", tree.prompt.id, *(token for node in tree.nodes for token in node.tokens))
    order = [leaves[i] for i in random.permutation(len(leaves))]
    first = next((leaf for leaf in order if tree.nodes[leaf].outcome > success_threshold), None)
    if first is not None:
        order = [first, *(leaf for leaf in order if leaf != first)]
    return sorted(order[:count])
