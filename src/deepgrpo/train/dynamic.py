"""Dynamic sampling, DAPO (arXiv:2503.14476): prompts without an advantage are replaced by others before the update.

    take prompts ─► grow ─► credit ─► keep the trees with an advantage ─► some missing? take that many more, and again

A tree is kept for any advantage at all, and judged when it is fully grown: a strategy that branches finds its signal where
all rollouts of a prompt fail, so a decision after the first round would drop the trees it needs (docs/details.md 43).
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from deepgrpo import rng
from deepgrpo.credit.group import NegativeRewardError
from deepgrpo.errors import TrainingError
from deepgrpo.explore.grow import Growth
from deepgrpo.loss.streams import ZERO_ADVANTAGE
from deepgrpo.prompts.source import Cursor
from deepgrpo.records import Credit, Prompt, Tree


class Takes(Protocol):
    """Prompts in order: a source, or the prompts that a curriculum drew for a step."""

    def take(self, cursor: Cursor, num_prompts: int) -> tuple[tuple[Prompt, ...], Cursor]: ...


Reason = Literal["solved", "failed", "other"]


@dataclass(frozen=True, slots=True)
class Batch:
    """The trees sampled in a step, and the ones that are trained."""

    growth: Growth
    """All sampled trees and their cost, in the order of the data."""
    credits: tuple[Credit, ...]
    """Credit of all trees."""
    kept: tuple[int, ...]
    """Indices of the trees that are trained."""
    cursor: Cursor
    """Position in the data after all prompts taken."""
    rounds: int
    """Calls of `grow`."""

    @property
    def trained(self) -> tuple[list[Tree], list[Credit]]:
        """Trained trees with their credit."""
        return [self.growth.trees[i] for i in self.kept], [self.credits[i] for i in self.kept]


def gather(
    source: Takes, cursor: Cursor, num_prompts: int, grow: Callable[[Sequence[Prompt], int], Growth],
    credit: Callable[[Tree], Credit], *, dynamic: bool = False, max_rounds: int = 1,
) -> Batch:  # fmt: skip
    """Sample the trees of a step. A pure function of the cursor if `grow` and `credit` are.

    Raises TrainingError if rewards do not go with `credit.scale`.

    Args:
        num_prompts: trees to train.
        grow: (prompts, round) → their trees; the round, from 0, must be part of the address of each draw.
        dynamic: replace trees without an advantage by trees of further prompts, for at most `max_rounds` rounds; fewer than
            `num_prompts` trees may then be kept. Otherwise all trees are kept.
    """
    growths: list[Growth] = []
    credits: list[Credit] = []
    kept: list[int] = []
    while len(kept) < num_prompts and len(growths) < (max_rounds if dynamic else 1):
        prompts, cursor = source.take(cursor, num_prompts - len(kept))
        growths.append(grow(prompts, len(growths)))
        for tree in growths[-1].trees:
            try:
                credits.append(credit(tree))
            except NegativeRewardError as error:
                raise TrainingError(str(error)) from error
            if not dynamic or has_signal(credits[-1]):
                kept.append(len(credits) - 1)
    return Batch(functools.reduce(operator.add, growths), tuple(credits), tuple(kept), cursor, len(growths))


def round_seed(seed: int, number: int) -> int:
    """Random seed of a round's draws. The first round has the run's seed, so that it draws as without dynamic sampling.

    With one seed for all rounds, a prompt that a small data set repeats within a step could draw the same rollouts again.
    """
    return rng.key(seed, "round", number) if number else seed


def has_signal(credit: Credit) -> bool:
    """True if any token has an advantage."""
    return any(abs(span.advantage) >= ZERO_ADVANTAGE and span.end > span.start for span in credit.spans)


def dynamic_metrics(batch: Batch, num_prompts: int, success_threshold: float) -> dict[str, float]:
    """Count rounds, prompts and kept trees, and dropped trees by reason."""
    chosen = set(batch.kept)
    dropped = [tree for i, tree in enumerate(batch.growth.trees) if i not in chosen]
    reasons = Counter(_reason(tree, success_threshold) for tree in dropped)
    return {
        "dynamic/rounds": float(batch.rounds),
        "dynamic/prompts": float(len(batch.growth.trees)),
        "dynamic/kept": float(len(batch.kept)),
        "dynamic/missing": float(num_prompts - len(batch.kept)),
        "dynamic/dropped_solved": float(reasons["solved"]),
        "dynamic/dropped_failed": float(reasons["failed"]),
        "dynamic/dropped_other": float(reasons["other"]),
        "dynamic/dropped_tokens": float(sum(node.num_sampled for tree in dropped for node in tree.nodes)),
    }


def _reason(tree: Tree, success_threshold: float) -> Reason:
    """Classify a tree without an advantage: all main rollouts succeed, all fail, or they differ without credit.

    If the main stream has no whole response, all responses count.
    """
    whole = [node for node in tree.nodes if node.finish != "segment"]
    responses = [node for node in whole if node.stream == "main"] or whole
    successes = [node.outcome > success_threshold for node in responses]
    return "solved" if all(successes) else "other" if any(successes) else "failed"
