"""Dynamic sampling, DAPO (arXiv:2503.14476): prompts that teach nothing are replaced by others before the update.

    take prompts ─► grow ─► credit ─► keep the trees with an advantage ─► some missing? take that many more, and again

A tree is kept for any advantage at all, and judged when it is grown: a strategy that branches finds its signal where all
rollouts of a prompt fail, so asking after the first round of rollouts would throw away what it looks for (docs/details.md 43).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from deepgrpo import rng
from deepgrpo.explore.grow import Growth, joined
from deepgrpo.loss.streams import ZERO_ADVANTAGE
from deepgrpo.prompts.source import Cursor, PromptSource
from deepgrpo.records import Credit, Prompt, Tree

Reason = Literal["solved", "failed", "other"]


@dataclass(frozen=True, slots=True)
class Batch:
    """What was sampled in a step, and which part of it is trained."""

    growth: Growth
    """Everything that was sampled and has to be paid for, in the order of the data."""
    credits: tuple[Credit, ...]
    """Of all trees."""
    kept: tuple[int, ...]
    """Indices of the trees that are trained."""
    cursor: Cursor
    """Behind everything that was taken."""
    rounds: int

    @property
    def trained(self) -> tuple[list[Tree], list[Credit]]:
        """The trees that are trained, with their credit."""
        return [self.growth.trees[i] for i in self.kept], [self.credits[i] for i in self.kept]


def gather(
    source: PromptSource, cursor: Cursor, num_prompts: int, grow: Callable[[Sequence[Prompt], int], Growth],
    credit: Callable[[Tree], Credit], *, dynamic: bool = False, max_rounds: int = 1,
) -> Batch:  # fmt: skip
    """Trees of a step. A pure function of the cursor if `grow` and `credit` are.

    Args:
        num_prompts: wanted trees.
        grow: (prompts, round) → their trees; the round, from 0, has to be part of the address of each draw.
        dynamic: whether trees without an advantage are replaced, by as many further prompts as are missing, for at most
            `max_rounds` rounds. Then fewer than `num_prompts` are kept. Otherwise all trees are.
    """
    growths: list[Growth] = []
    credits: list[Credit] = []
    kept: list[int] = []
    while len(kept) < num_prompts and len(growths) < (max_rounds if dynamic else 1):
        prompts, cursor = source.take(cursor, num_prompts - len(kept))
        growths.append(grow(prompts, len(growths)))
        for tree in growths[-1].trees:
            credits.append(credit(tree))
            if not dynamic or has_signal(credits[-1]):
                kept.append(len(credits) - 1)
    return Batch(joined(growths), tuple(credits), tuple(kept), cursor, len(growths))


def round_seed(seed: int, number: int) -> int:
    """The seed of a round's draws. The first has the run's own: if nothing is replaced, dynamic sampling changes nothing.

    Without one of its own, a prompt that a small data set gives twice in a step could draw the same rollouts again.
    """
    return rng.key(seed, "round", number) if number else seed


def has_signal(credit: Credit) -> bool:
    """Whether any token has an advantage."""
    return any(abs(span.advantage) >= ZERO_ADVANTAGE and span.end > span.start for span in credit.spans)


def dynamic_metrics(batch: Batch, num_prompts: int, success_threshold: float) -> dict[str, float]:
    """How many prompts it took, and why the others were dropped."""
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
        "dynamic/dropped_tokens": float(sum(len(node.tokens) for tree in dropped for node in tree.nodes)),
    }


def _reason(tree: Tree, success_threshold: float) -> Reason:
    """Why a tree has no advantage: all main rollouts succeed, all fail, or they differ and the strategy gave no credit.

    Where the main stream has no whole response, all responses are asked.
    """
    whole = [node for node in tree.nodes if node.finish != "segment"]
    responses = [node for node in whole if node.stream == "main"] or whole
    successes = [node.reward > success_threshold for node in responses]
    return "solved" if all(successes) else "other" if any(successes) else "failed"
