"""Prompts of rows that are read when they are needed: of data that are larger than memory, with a place from which to resume.

    reader ─► rows of the next places ─► columns picked, rendered, too long? ─► prompts; rows left out are counted in the cursor

A reader has its rows by address (`AddressedReader`: any row at once, a permutation computed by address), or in order only
(windows.py). What is left out is known only when its turn comes: `size` counts rows, and the cursor counts what was skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Protocol

from deepgrpo.config import ColumnMap, TemplateConfig
from deepgrpo.errors import DataError
from deepgrpo.prompts.base import SOME, Cursor, PromptSource
from deepgrpo.prompts.chat import Renderer
from deepgrpo.prompts.fingerprint import Digest
from deepgrpo.prompts.permutation import Permutation
from deepgrpo.prompts.rows import QuestionRow, RawRow, pick_one
from deepgrpo.prompts.sieve import Sieve
from deepgrpo.records import Prompt

_CHECKED = 1024
"""Rows of which one at least must be usable before a run starts."""


class Rows(Protocol):
    """Rows by address."""

    count: int
    digest: str
    """Digest of the content that the fingerprint covers (docs/data.md)."""

    def fetch(self, numbers: Sequence[int]) -> list[RawRow | None]:
        """Rows by their numbers from 0; None for a blank line."""


class Reader(Protocol):
    """Rows in the order of the run."""

    size: int | None
    """Rows of an epoch; None if it is not known."""
    order_seed: int | None
    digest: str
    source: str
    """Name for messages."""
    unit: str
    """Unit of the row numbers ("line", "row"), for messages."""

    def read(self, cursor: Cursor, count: int) -> tuple[list[RawRow | None], Cursor]:
        """The rows at a cursor, at most `count` and at most the rest of its epoch, and the cursor after them."""

    def first(self) -> Iterator[RawRow | None]:
        """All rows in the order of the data."""


class AddressedReader:
    """Rows by address, in an order that is computed by address."""

    def __init__(self, rows: Rows, source: str, unit: str, *, limit: int | None, seed: int, shuffle: bool) -> None:
        self._rows, self._seed, self._shuffle = rows, seed, shuffle
        self._count = rows.count if limit is None else min(rows.count, limit)
        self.size: int | None = self._count
        self.order_seed: int | None = seed if shuffle else None
        self.digest, self.source, self.unit = rows.digest, source, unit

    def read(self, cursor: Cursor, count: int) -> tuple[list[RawRow | None], Cursor]:
        """See `Reader.read`."""
        end = min(cursor.position + count, self._count)
        places = range(cursor.position, end)
        numbers = list(places)
        if self._shuffle and numbers:
            numbers = Permutation(self._count, self._seed, "shuffle", cursor.epoch)(places)
        after = (
            replace(cursor, position=end) if end < self._count else replace(cursor, epoch=cursor.epoch + 1, position=0)
        )
        return self._rows.fetch(numbers), after

    def first(self) -> Iterator[RawRow | None]:
        """See `Reader.first`."""
        for start in range(0, self._count, SOME):
            yield from self._rows.fetch(range(start, min(start + SOME, self._count)))


class StreamedSource(PromptSource):
    """Prompts of a reader; call `check` before the first use."""

    def __init__(self, reader: Reader, columns: ColumnMap, renderer: Renderer, longest: int, source: str = "") -> None:
        self._reader, self._columns, self._renderer = reader, columns, renderer
        self._longest, self._source = longest, source
        self.skipped, self.digest, self.order_seed = {}, reader.digest, reader.order_seed

    @property
    def size(self) -> int | None:
        return self._reader.size

    @property
    def described(self) -> str:
        size = self._reader.size
        return f"{'' if size is None else f'{size:,} '}rows, read when they are needed"

    def take(self, cursor: Cursor, num_prompts: int) -> tuple[tuple[Prompt, ...], Cursor]:
        """See `PromptSource.take`. Raises DataError if two rows of a batch have one id, or no row of a pass is usable."""
        found: list[Prompt] = []
        places: dict[str, int] = {}
        began = cursor.epoch
        while len(found) < num_prompts:
            raws, after = self._reader.read(cursor, num_prompts - len(found))
            sieve = Sieve(self._renderer, self._longest, self._source)
            for raw, _, prompt in self._usable(raws, sieve):
                if places.setdefault(prompt.id, raw.number) != raw.number:
                    raise DataError(
                        f"{self._reader.source}: id {prompt.id!r} is in {self._reader.unit} {places[prompt.id]} and in "
                        f'{self._reader.unit} {raw.number}; make ids unique, or set data.columns.id = "none" to number the rows'
                    )
                found.append(prompt)
            cursor = replace(after, skipped=cursor.skipped + sum(sieve.skipped.values()))
            if not found and cursor.epoch > began + 1:
                raise sieve.none_left("streamed", ", read from one end to the other")
        return tuple(found), cursor

    def head(self, num_prompts: int) -> tuple[Prompt, ...]:
        """See `PromptSource.head`."""
        found: list[Prompt] = []
        rows = self._reader.first()
        while len(found) < num_prompts and (raws := list(islice(rows, min(num_prompts - len(found), SOME)))):
            found += [prompt for _, _, prompt in self._usable(raws, Sieve(self._renderer, self._longest, self._source))]
        return tuple(found)

    def metrics(self, cursor: Cursor) -> dict[str, float]:
        """See `PromptSource.metrics`."""
        part = cursor.position / self.size if self.size else 0.0
        return {"data/epochs": cursor.epoch + part, "data/skipped": float(cursor.skipped)}

    def check(self, kind: str, template: TemplateConfig) -> None:
        """Look at the first rows, so that an error in the columns or the template ends the run before it starts.

        Raises DataError if none of them is usable, ConfigError if none fills a placeholder.
        """
        sieve = Sieve(self._renderer, self._longest, self._source)
        digest, columns, usable, count = Digest(), [], 0, 0
        rows = self._reader.first()
        while count < SOME or (not usable and count < _CHECKED):
            raws = list(islice(rows, SOME))
            count += len(raws)
            picked = self._usable(raws, sieve)
            columns += [raw.values for raw in raws if raw is not None and raw.values is not None]
            usable += len(picked)
            for _, row, prompt in picked:
                digest.add(row, prompt.tokens)
            if len(raws) < SOME:
                break
        if not count:
            raise DataError(
                f"{self._reader.source} is empty; it needs at least one row with a column {self._columns.question!r}"
            )
        sieve.refuse_unfilled(template, columns)
        if not usable:
            raise sieve.none_left(kind, f" among its first {count:,}")
        digest.text(self._reader.digest)
        self.digest = digest.hex()

    def _usable(self, raws: Sequence[RawRow | None], sieve: Sieve) -> list[tuple[RawRow, QuestionRow, Prompt]]:
        reader = self._reader
        picked = {}
        for raw in raws:
            if raw is not None:
                row = pick_one(raw, self._columns, reader.source, reader.unit, sieve.skipped)
                if row is not None:
                    picked[id(row)] = (raw, row)
        return [(*picked[id(row)], prompt) for row, prompt in sieve.usable([row for _, row in picked.values()])]
