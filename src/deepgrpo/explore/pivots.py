"""What strategies share that branch where segments end: candidates, the draw, and the loop over rollouts.

    chain of a rollout  = root, end of segment 1, ..., end of segment m        (length m + 1)
    candidates          = all of them but the last                             (index 0 .. m - 1)
    depth ratio         r = (index + 1) / (m + 1)

How a candidate is weighed is the strategy's own business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from deepgrpo.config import DeepExplore, RandomExplore
from deepgrpo.explore.base import Limits
from deepgrpo.explore.segments import Segmenter
from deepgrpo.records import Pivot, Tree

Weigh = Callable[[Sequence[float]], np.ndarray]
"""Depth ratios `[n]` → log Q `[n]`, normalised."""


def draw_pivots(
    tree: Tree, config: DeepExplore | RandomExplore, segment: Segmenter, weigh: Weigh, limits: Limits,
    random: np.random.Generator,
) -> list[Pivot]:  # fmt: skip
    """Pivots of the second round: `num_pivots` candidates of every rollout that is to be expanded, drawn from Q.

    A rollout without candidates gets none: its prompt leaves no room, or the root was its only state and is not allowed.

    Args:
        tree: the rollouts of a prompt.
        config: says which rollouts are expanded, how many pivots they get, and with how many branches.
    """
    pivots: list[Pivot] = []
    for index, node in tree.stream("main"):
        if config.expand == "failed" and node.reward > config.success_threshold:
            continue
        offsets, ratios = candidates(segment(node.tokens), room=limits.response(tree), root=config.root_pivot)
        if not offsets:
            continue
        log_q = weigh(ratios)
        q = np.exp(log_q)
        for i in draw_without_replacement(log_q, config.num_pivots, random):
            pivots.append(
                Pivot(
                    parent=index, offset=offsets[i], num_branches=config.branches_per_pivot, ratio=ratios[i],
                    candidates=tuple(offsets), q=tuple(float(p) for p in q),
                )
            )  # fmt: skip
    return pivots


def candidates(ends: Sequence[int], *, room: int, root: bool = True) -> tuple[list[int], list[float]]:
    """Offsets and depth ratios of the states that may become pivots.

    Args:
        ends: ascending ends of the segments; the last one is the end of the rollout.
        room: longest response; a state must leave space for at least one more token.
        root: whether the prompt itself is among them (index 0 of the chain, ratio 1 / len(chain)).

    Example: ends [10, 20, 30, 40] make a chain of 5; candidates at 0, 10, 20, 30 with r = .2, .4, .6, .8.
    """
    chain = [0, *ends]
    keep = [i for i in range(0 if root else 1, len(chain) - 1) if chain[i] < room]
    return [chain[i] for i in keep], [(i + 1) / len(chain) for i in keep]


def draw_without_replacement(log_q: np.ndarray, count: int, random: np.random.Generator) -> list[int]:
    """Draw distinct indices one after the other, each time in proportion to Q among those left.

    By the Gumbel trick: the order of `log q + Gumbel noise`, from the top, has exactly this distribution.
    """
    noisy = log_q + random.gumbel(size=len(log_q))
    return [int(i) for i in np.argsort(-noisy, kind="stable")[: min(count, len(log_q))]]
