"""Facts of a tree: rescued, unrecoverable, truncated, mixed, solved, failed, and the depth bin of a pivot.

Metrics, the report's filters, `deepgrpo inspect` and `deepgrpo probe` all use these definitions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deepgrpo.records import ROOT, Group, Tree

Flag = Literal["rescued", "unrecoverable", "truncated", "mixed", "solved", "failed"]
FLAGS: tuple[Flag, ...] = ("rescued", "unrecoverable", "truncated", "mixed", "solved", "failed")
"""Order of the flags' bits in a report page."""

DEPTH_BINS = 10
"""Bins of the depth ratio r in (0, 1]; bin i holds i / 10 < r ≤ (i + 1) / 10."""


@dataclass(frozen=True, slots=True)
class TreeFacts:
    """Counts and flags of a tree.

    Example (the worked tree of records.py): TreeFacts(flags={"rescued", "mixed"}, rollouts=2, reward=0.5, successes=1,
    branches=2, pivots=1, chances=1, rescued=1, tokens=16).
    """

    flags: frozenset[Flag]
    rollouts: int
    """Responses in the main stream."""
    reward: float
    """Their mean reward."""
    successes: int
    """Rollouts above the success threshold."""
    branches: int
    """Responses in the branch stream."""
    pivots: int
    """Pivots of the branch stream."""
    chances: int
    """Pivots that could be rescued: the rollout failed, or some branch beats it anyway."""
    rescued: int
    """Pivots with a branch that succeeds and beats the rollout it left."""
    tokens: int
    """Sampled tokens, each counted once."""


def tree_facts(tree: Tree, threshold: float = 0.0) -> TreeFacts:
    """Count and classify a tree. A segment is not a response: it has no reward and is never truncated.

    Args:
        tree: a tree without main responses has mean reward 0.
        threshold: outcomes (`Node.outcome`) above it are successes.
    """
    rollouts = [node for _, node in tree.stream("main") if node.complete]
    main = [node.reward for node in rollouts]
    pivots = [i for i, pivot in enumerate(tree.pivots) if pivot.stream == "branch"]
    rescued = [is_rescued(tree, i, threshold) for i in pivots]
    chances = sum(saved or bar_of(tree, i, threshold) <= threshold for i, saved in zip(pivots, rescued, strict=True))
    successes = sum(node.outcome > threshold for node in rollouts)
    flags: dict[Flag, bool] = {
        "rescued": any(rescued),
        "unrecoverable": sum(rescued) < chances,
        "truncated": any(node.finish == "length" for node in tree.nodes),
        "mixed": is_mixed(main),
        "solved": bool(main) and successes == len(main),
        "failed": bool(main) and successes == 0,
    }
    return TreeFacts(
        flags=frozenset(flag for flag, holds in flags.items() if holds),
        rollouts=len(main), reward=sum(main) / len(main) if main else 0.0, successes=successes,
        branches=sum(node.complete for _, node in tree.stream("branch")), pivots=len(pivots), chances=chances,
        rescued=sum(rescued), tokens=sum(node.num_sampled for node in tree.nodes),
    )  # fmt: skip


def is_rescued(tree: Tree, pivot: int, threshold: float = 0.0) -> bool:
    """True if a branch succeeds and does better than the rollout it left. A failure at a lower price is no rescue."""
    bar = bar_of(tree, pivot, threshold)
    return any(tree.nodes[child].outcome > bar for child in tree.children(pivot))


def bar_of(tree: Tree, pivot: int, threshold: float = 0.0) -> float:
    """Outcome that a branch has to exceed for a rescue: the threshold, or that of the rollout it left if that succeeded."""
    parent = tree.pivots[pivot].parent
    return max(threshold, tree.nodes[parent].outcome) if parent != ROOT and tree.nodes[parent].complete else threshold


def succeeds(tree: Tree, pivot: int, threshold: float = 0.0) -> bool:
    """True if a branch of the pivot is a success: the label of the recoverability fit."""
    return any(tree.nodes[child].outcome > threshold for child in tree.children(pivot))


def is_mixed(rewards: Sequence[float]) -> bool:
    """True if the rewards of a group differ, so that the group carries signal. No rewards are not mixed."""
    return bool(rewards) and Group("main", tuple(rewards)).mixed


def depth_bin(ratio: float, bins: int = DEPTH_BINS) -> int:
    """Bin 0..bins - 1 of a depth ratio: bin i holds i / bins < r ≤ (i + 1) / bins.

    >>> [depth_bin(r, 4) for r in (0.1, 0.25, 0.26, 1.0)]
    [0, 0, 1, 3]
    """
    # 3 / 10 belongs to bin 2 although 0.3 * 10 is 3.0000000000000004 for some quotients
    return min(bins - 1, max(0, math.ceil(ratio * bins - 1e-9) - 1))
