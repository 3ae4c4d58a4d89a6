"""Rows that can only be read in order, such as a set streamed from the hub: shuffled by shards and in windows.

    epoch    the shards in an order of their own: rows 0, 1, 2, ... of the stream
    window   rows W·w .. W·w + W - 1 of the stream, held in memory and shuffled among themselves

The order is a function of (seed, epoch, position), so a resumed run continues exactly. The cursor also carries the state of
the stream where its window begins: resuming reads at most one window again, not all that came before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from deepgrpo import rng
from deepgrpo.prompts.base import Cursor
from deepgrpo.prompts.readers import short_floats, unreadable_row, with_own_digits
from deepgrpo.prompts.rows import RawRow

_SAMPLED = 64
"""Rows that the digest covers, from the start."""


@dataclass
class _Stream:
    """The stream of an epoch, read up to the start of a window."""

    epoch: int
    window: int
    number: int
    """Shard that is read, in the order of the epoch."""
    shard: Any
    rows: Iterator[dict[str, Any]]
    unread: Mapping[str, Any] | None = None
    """State that the shard was opened with, until a row is read: it does not tell it before."""
    untouched: bool = True
    """True until a row of the shard is read."""

    def next(self) -> dict[str, Any] | None:
        """The next row of the shard; None at its end."""
        row = next(self.rows, None)
        self.untouched = False
        return row

    def state(self) -> Mapping[str, Any]:
        """The place as plain JSON."""
        inner = self.unread if self.untouched else self.shard.state_dict()
        return {"epoch": self.epoch, "window": self.window, "shard": self.number, "state": inner}


class WindowedReader:
    """Rows of a `datasets.IterableDataset`; see `streamed.Reader`.

    Args:
        loaded: the data set.
        window: rows of a window.
        limit: only this many rows, from the start; the shards then keep their order.
    """

    def __init__(self, loaded: Any, source: str, *, window: int, limit: int | None, seed: int, shuffle: bool) -> None:
        self._loaded, self._short = loaded.with_format(None), short_floats(loaded)
        self._window, self._limit, self._seed, self._shuffle = window, limit, seed, shuffle
        self._shards = int(loaded.num_shards)
        self.size: int | None = None
        self.order_seed: int | None = seed if shuffle else None
        self.source, self.unit = source, "row"
        self._stream: _Stream | None = None
        self._held: tuple[int, int, list[RawRow | None], Mapping[str, Any]] | None = None
        digest = hashlib.blake2b(f"{self._shards} {loaded.features}".encode(), digest_size=16)
        for row in islice(self.first(), _SAMPLED):
            digest.update(json.dumps(row and row.values, default=str, sort_keys=True).encode("utf-8", "surrogatepass"))
        self.digest = digest.hexdigest()

    def read(self, cursor: Cursor, count: int) -> tuple[list[RawRow | None], Cursor]:
        """See `Reader.read`. Reads at most the rest of a window."""
        number, begin = divmod(cursor.position, self._window)
        rows, place = self._rows(cursor.epoch, number, cursor.place)
        found = rows[begin : begin + count]
        position = cursor.position + len(found)
        if begin + len(found) < len(rows):
            return found, replace(cursor, position=position, place=place)
        if len(rows) < self._window:  # the last one
            return found, replace(cursor, epoch=cursor.epoch + 1, position=0, place=None)
        assert self._stream is not None
        return found, replace(cursor, position=position, place=self._stream.state())

    def first(self) -> Iterator[RawRow | None]:
        """See `Reader.first`."""
        try:
            rows = islice(self._loaded, self._limit)
            yield from (self._raw(number, row) for number, row in enumerate(rows, start=1))
        except Exception as error:  # the hub client and the builders have no common base error
            raise unreadable_row(self.source, error) from error

    def _raw(self, number: int, row: dict[str, Any]) -> RawRow:
        return RawRow(number, with_own_digits(row, self._short))

    def _rows(
        self, epoch: int, window: int, place: Mapping[str, Any] | None
    ) -> tuple[list[RawRow | None], Mapping[str, Any]]:
        """The rows of a window in their order, and the state of the stream where it begins."""
        if self._held is not None and self._held[:2] == (epoch, window):
            return self._held[2], self._held[3]
        try:
            stream = self._at(epoch, window, place)
            begin, state = window * self._window, stream.state()
            rest = self._window if self._limit is None else max(0, min(self._window, self._limit - begin))
            raws: list[RawRow | None] = []
            while len(raws) < rest:
                row = stream.next()
                if row is not None:
                    raws.append(self._raw(begin + len(raws) + 1, row))
                elif stream.number + 1 < self._shards:
                    self._open(stream, stream.number + 1)
                else:
                    break
            stream.window = window + 1
        except Exception as error:
            raise unreadable_row(self.source, error) from error
        if self._shuffle:
            order = rng.generator(self._seed, "window", epoch, window).permutation(len(raws))
            raws = [raws[index] for index in order]
        self._held = (epoch, window, raws, state)
        return raws, state

    def _at(self, epoch: int, window: int, place: Mapping[str, Any] | None) -> _Stream:
        """The stream at the start of a window: it is there, the cursor's place leads there, or rows are read up to there."""
        stream = self._stream
        if stream is not None and (stream.epoch, stream.window) == (epoch, window):
            return stream
        self._stream = stream = _Stream(epoch, 0, 0, None, iter(()))
        if place is not None and (place.get("epoch"), place.get("window")) == (epoch, window):
            stream.window = window
            self._open(stream, int(place["shard"]), place["state"])
            return stream
        self._open(stream, 0)
        for _ in range(window * self._window):
            while stream.next() is None:
                if stream.number + 1 >= self._shards:
                    return stream
                self._open(stream, stream.number + 1)
        stream.window = window
        return stream

    def _open(self, stream: _Stream, number: int, state: Mapping[str, Any] | None = None) -> None:
        """Read a shard of the epoch, from its start or from a state."""
        order = list(range(self._shards))
        if self._shuffle and self._limit is None:
            order = rng.generator(self._seed, "shards", stream.epoch).permutation(self._shards).tolist()
        stream.number = number
        stream.shard = self._loaded.shard(self._shards, order[number]) if self._shards > 1 else self._copy()
        if state is not None:
            stream.shard.load_state_dict(dict(state))
        stream.rows, stream.unread, stream.untouched = iter(stream.shard), state, True

    def _copy(self) -> Any:
        """The data set with a state of its own: `first` reads it as well."""
        return self._loaded.with_format(None)
