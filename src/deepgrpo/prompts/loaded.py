"""Prompts of rows that are in memory, or that are generated without end.

Rows are rendered and tokenized when taken; they are also tokenized once at the start, to measure their length and to know
the data again when a run is resumed (fingerprint.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from deepgrpo import rng
from deepgrpo.config import TemplateConfig
from deepgrpo.prompts.base import Cursor, PromptSource
from deepgrpo.prompts.fingerprint import Digest
from deepgrpo.prompts.rows import QuestionRow
from deepgrpo.prompts.sieve import Sieve
from deepgrpo.records import Prompt

_CHUNK = 1024


class LoadedSource(PromptSource):
    """Rows in memory, reshuffled every epoch."""

    def __init__(
        self,
        rows: Sequence[QuestionRow],
        sieve: Sieve,
        *,
        seed: int,
        shuffle: bool,
        skipped: Mapping[str, int],
        digest: str,
    ) -> None:
        self._rows, self._sieve, self._seed, self._shuffle = rows, sieve, seed, shuffle
        self.skipped, self.digest = dict(skipped), digest
        self.order_seed = seed if shuffle else None

    @property
    def size(self) -> int:
        return len(self._rows)

    def take(self, cursor: Cursor, num_prompts: int) -> tuple[tuple[Prompt, ...], Cursor]:
        """See `PromptSource.take`."""
        rows: list[QuestionRow] = []
        while len(rows) < num_prompts:
            order = self._order(cursor.epoch)
            picked = order[cursor.position : cursor.position + num_prompts - len(rows)]
            rows += [self._rows[i] for i in picked]
            cursor = replace(cursor, position=cursor.position + len(picked))
            if cursor.position >= len(order):
                cursor = replace(cursor, epoch=cursor.epoch + 1, position=0)
        return self._sieve.prompts(rows), cursor

    def head(self, num_prompts: int) -> tuple[Prompt, ...]:
        """See `PromptSource.head`."""
        return self._sieve.prompts(self._rows[:num_prompts])

    def at(self, indices: Sequence[int]) -> tuple[Prompt, ...]:
        """Prompts by their numbers in data order."""
        return self._sieve.prompts([self._rows[i] for i in indices])

    def known(self) -> tuple[Prompt, ...]:
        return self.head(self.size)

    def metrics(self, cursor: Cursor) -> dict[str, float]:
        """See `PromptSource.metrics`."""
        return {"data/epochs": cursor.epoch + cursor.position / self.size}

    def _order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(self.size))
        return [int(i) for i in rng.generator(self._seed, "shuffle", epoch).permutation(self.size)]


class EndlessSource(PromptSource):
    """Rows generated without end: a function of the index."""

    def __init__(self, make: Callable[[int], QuestionRow], sieve: Sieve, *, digest: str) -> None:
        self._make, self._sieve = make, sieve
        self.skipped, self.digest, self.order_seed = {}, digest, None

    @property
    def size(self) -> None:
        return None

    def take(self, cursor: Cursor, num_prompts: int) -> tuple[tuple[Prompt, ...], Cursor]:
        """See `PromptSource.take`."""
        rows = [self._make(cursor.position + i) for i in range(num_prompts)]
        return self._sieve.prompts(rows), replace(cursor, position=cursor.position + num_prompts)

    def head(self, num_prompts: int) -> tuple[Prompt, ...]:
        """See `PromptSource.head`."""
        return self._sieve.prompts([self._make(i) for i in range(num_prompts)])


def usable_rows(
    rows: Sequence[QuestionRow], sieve: Sieve, kind: str, template: TemplateConfig
) -> tuple[list[QuestionRow], str]:
    """Rows that can be used, and their digest. Raises DataError if none is left, ConfigError if no row fills a placeholder."""
    kept: list[QuestionRow] = []
    digest = Digest()
    for start in range(0, len(rows), _CHUNK):  # in chunks, to bound the memory for tokens
        for row, prompt in sieve.usable(rows[start : start + _CHUNK]):
            kept.append(row)
            digest.add(row, prompt.tokens)
    sieve.refuse_unfilled(template, [row.columns for row in rows])
    if not kept:
        raise sieve.none_left(kind)
    return kept, digest.hex()
