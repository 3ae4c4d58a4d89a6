"""What a tree is called: rescued, unrecoverable, truncated, mixed. The words of the filters, on the page and in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deepgrpo.records import ROOT, Tree

Flag = Literal["rescued", "unrecoverable", "truncated", "mixed", "solved", "failed"]
FLAGS: tuple[Flag, ...] = ("rescued", "unrecoverable", "truncated", "mixed", "solved", "failed")
"""In the order of their bits on the page."""

_EQUAL = 1e-8
"""Rewards nearer than this are the same, as in `Group.mixed`."""


@dataclass(frozen=True, slots=True)
class TreeFacts:
    """A tree in a few figures.

    Example (the worked tree of records.py): TreeFacts(flags={"rescued", "mixed"}, rollouts=2, reward=0.5, branches=2,
    successes=1, pivots=1, chances=1,
    rescued=1, tokens=16).
    """

    flags: frozenset[Flag]
    rollouts: int
    """Responses of the main stream."""
    reward: float
    """Mean over them."""
    successes: int
    """Those above the threshold."""
    branches: int
    """Responses of the branch stream."""
    pivots: int
    """Pivots of the branch stream."""
    chances: int
    """Those of them with something to rescue: the rollout they are in failed, or a branch is better than it all the same."""
    rescued: int
    """Pivots with a branch better than the rollout they are in."""
    tokens: int
    """Sampled tokens, each once."""


def tree_facts(tree: Tree, threshold: float = 0.0) -> TreeFacts:
    """Count what a tree holds. A segment is no response, so it has no reward and is never truncated.

    Args:
        tree: at least one response in the main stream, or its mean reward is 0.
        threshold: rewards above it are successes.
    """
    main = [node.reward for _, node in tree.stream("main") if node.complete]
    pivots = [i for i, pivot in enumerate(tree.pivots) if pivot.stream == "branch"]
    rescued = [is_rescued(tree, i) for i in pivots]
    chances = sum(saved or floor_of(tree, i) <= threshold for i, saved in zip(pivots, rescued, strict=True))
    successes = sum(reward > threshold for reward in main)
    flags: dict[Flag, bool] = {
        "rescued": any(rescued),
        "unrecoverable": sum(rescued) < chances,
        "truncated": any(node.finish == "length" for node in tree.nodes),
        "mixed": unequal(main),
        "solved": bool(main) and successes == len(main),
        "failed": bool(main) and successes == 0,
    }
    return TreeFacts(
        flags=frozenset(flag for flag, holds in flags.items() if holds),
        rollouts=len(main), reward=sum(main) / len(main) if main else 0.0, successes=successes,
        branches=sum(node.complete for _, node in tree.stream("branch")), pivots=len(pivots), chances=chances,
        rescued=sum(rescued), tokens=sum(len(node.tokens) for node in tree.nodes),
    )  # fmt: skip


def is_rescued(tree: Tree, pivot: int) -> bool:
    """Whether a branch does better than the rollout it branched from, as in the metric `pivots/rescue_rate`."""
    floor = floor_of(tree, pivot)
    return any(tree.nodes[child].reward > floor for child in tree.children(pivot))


def floor_of(tree: Tree, pivot: int) -> float:
    """The reward that a branch has to beat: that of the rollout it branched from, 0 at the prompt."""
    parent = tree.pivots[pivot].parent
    return tree.nodes[parent].reward if parent != ROOT else 0.0


def unequal(rewards: Sequence[float]) -> bool:
    """Whether a group carries any signal."""
    return bool(rewards) and max(rewards) - min(rewards) > _EQUAL
