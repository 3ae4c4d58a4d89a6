"""Prompts of several sources, mixed by weight.

Prompt k comes from the source whose next turn is earliest: the j-th prompt of a source with weight w has its turn at
(j + 1/2) / w. After n prompts of S sources, each has had its share of them to within (1 + S) / 2. No source ever ends: each
begins its next epoch when it is through, and the cursor counts the epochs of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from deepgrpo.prompts.base import Cursor, PromptSource
from deepgrpo.records import Prompt


@dataclass(frozen=True, slots=True)
class Part:
    """A source of a mix."""

    name: str
    weight: float
    source: PromptSource


class MixedSource(PromptSource):
    """Several sources, mixed by weight."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self._weights = [part.weight for part in parts]
        text = repr([(part.name, part.weight, part.source.digest) for part in parts])
        self.digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self.order_seed = next((part.source.order_seed for part in parts if part.source.order_seed is not None), None)

    @property
    def skipped(self) -> Mapping[str, int]:  # type: ignore[override]
        """Rows left out at the start, by source and reason."""
        return {
            f"{reason} of {part.name}": count for part in self._parts for reason, count in part.source.skipped.items()
        }

    @property
    def size(self) -> int | None:
        sizes = [part.source.size for part in self._parts]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def described(self) -> str:
        total = sum(self._weights)
        each = [f"{part.name} {part.weight / total:.0%} ({part.source.described})" for part in self._parts]
        return f"{len(each)} sources: {', '.join(each)}"

    def take(self, cursor: Cursor, num_prompts: int) -> tuple[tuple[Prompt, ...], Cursor]:
        """See `PromptSource.take`."""
        cursors = list(cursor.sources)
        if len(cursors) != len(self._parts):  # the start, or data that were changed for a resume
            cursors = [Cursor() for _ in self._parts]
        turns = turns_of(self._weights, [each.taken for each in cursors], num_prompts)
        taken = []
        for index, part in enumerate(self._parts):
            count = turns.count(index)
            prompts, after = part.source.take(cursors[index], count) if count else ((), cursors[index])
            cursors[index] = replace(after, taken=cursors[index].taken + count)
            taken.append(iter(prompts))
        return tuple(next(taken[index]) for index in turns), replace(
            cursor, position=cursor.position + num_prompts, sources=tuple(cursors)
        )

    def head(self, num_prompts: int) -> tuple[Prompt, ...]:
        """See `PromptSource.head`: the first prompts of each, by weight; a source that ends leaves its turns to the others."""
        limits = [part.source.size for part in self._parts]
        turns = turns_of(self._weights, [0] * len(limits), num_prompts, limits)
        heads = [iter(part.source.head(turns.count(index))) for index, part in enumerate(self._parts)]
        found = [next(heads[index], None) for index in turns]
        return tuple(prompt for prompt in found if prompt is not None)

    def known(self) -> tuple[Prompt, ...]:
        return tuple(prompt for part in self._parts for prompt in part.source.known())

    def metrics(self, cursor: Cursor) -> dict[str, float]:
        """See `PromptSource.metrics`."""
        found: dict[str, float] = {}
        for part, each in zip(self._parts, cursor.sources, strict=True):
            inner = part.source.metrics(each)
            found |= {f"source/{part.name}/{name.removeprefix('data/')}": value for name, value in inner.items()}
        return found


def turns_of(
    weights: Sequence[float], taken: Sequence[int], count: int, limits: Sequence[int | None] | None = None
) -> list[int]:
    """Indices of the sources of the next prompts.

    Args:
        weights: of the sources.
        taken: prompts that each has given so far.
        count: prompts wanted; fewer are returned if all sources end.
        limits: number of prompts of each source, if it ends; None: it never does.

    >>> turns_of([2, 1], [0, 0], 6)
    [0, 1, 0, 0, 1, 0]
    """
    given = list(taken)
    turns: list[int] = []
    while len(turns) < count:
        free = [i for i in range(len(given)) if limits is None or limits[i] is None or given[i] < (limits[i] or 0)]
        if not free:
            break
        turns.append(min(free, key=lambda i: ((given[i] + 0.5) / weights[i], i)))
        given[turns[-1]] += 1
    return turns
