"""Lines of a JSONL file by their number, without the file in memory.

    index   byte offset of every 64th line, found in one pass that also digests the file: 0.1 bytes of memory per line
    line    seek to the 64th before it, and read on
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepgrpo.errors import DataError
from deepgrpo.prompts.jsonl import parse_line, refuse_other_formats
from deepgrpo.prompts.rows import RawRow
from deepgrpo.prompts.shards import names_of

_EVERY = 64
_CHUNK = 1 << 22
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class LineIndex:
    """Index of a file. Example, of 100 lines: LineIndex(path, "d.jsonl", offsets=array([0, 9120]), count=100, digest="5f")."""

    path: Path
    name: str
    """For messages."""
    offsets: np.ndarray
    """Byte offset of lines 0, 64, 128, ..."""
    count: int
    digest: str
    """Digest of all bytes."""

    def read(self, lines: Sequence[int]) -> list[dict[str, Any] | bool | None]:
        """Rows of some lines, numbered from 0; None for one that is not UTF-8, False for a blank one.

        Raises DataError if a line is not a JSON object, or the file has become shorter.
        """
        try:
            with self.path.open("rb") as file:
                found: list[dict[str, Any] | bool | None] = []
                at = -1
                for line in lines:
                    if line != at:
                        file.seek(int(self.offsets[line // _EVERY]))
                        for _ in range(line % _EVERY):
                            file.readline()
                    text, at = file.readline(), line + 1
                    found.append(parse_line(text, self.name, line + 1) if text.strip(b"\xef\xbb\xbf \t\r\n") else False)
                return found
        except OSError as error:
            raise DataError(f"data.path {self.name!r} cannot be read: {error}; put the file back") from error


def index_lines(path: Path, name: str) -> LineIndex:
    """Index a file in one pass. Raises DataError: it is gzipped, has another format or cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    starts: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    count = size = 0
    last = b"\n"
    try:
        with path.open("rb") as file:
            if file.peek(2).startswith(_GZIP):
                raise DataError(
                    f"data.path {name!r} is gzipped, and data.streaming reads lines by their place in the file; unpack it "
                    "(gunzip -k FILE), or set data.streaming = false"
                )
            refuse_other_formats(file, name)
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10)
                # the line after the k-th end of the file has number k + 1
                numbers = count + 1 + np.arange(len(ends))
                starts.append(size + 1 + ends[numbers % _EVERY == 0])
                count, size, last = count + len(ends), size + len(chunk), chunk[-1:]
    except OSError as error:
        raise DataError(f"data.path {name!r} cannot be read: {error}; repair the file or write it again") from error
    offsets = np.concatenate(starts)
    return LineIndex(path, name, offsets, count + (last != b"\n"), digest.hexdigest())


class LineRows:
    """Rows of JSONL files by address; see `streamed.Rows`."""

    def __init__(self, files: Sequence[Path], name: str) -> None:
        several = len(files) > 1
        self._names = names_of(files) if several else [None]
        self._files = [index_lines(file, str(file) if several else name) for file in files]
        self._first = np.cumsum([0, *(each.count for each in self._files)])
        self.count = int(self._first[-1])
        self.digest = " ".join(each.digest for each in self._files)

    def fetch(self, numbers: Sequence[int]) -> list[RawRow | None]:
        """See `Rows.fetch`."""
        where = np.searchsorted(self._first, numbers, side="right") - 1
        found: list[RawRow | None] = [None] * len(numbers)
        for index in dict.fromkeys(where.tolist()):
            file, short = self._files[index], self._names[index]
            slots = [slot for slot, its in enumerate(where) if its == index]
            lines = [numbers[slot] - int(self._first[index]) for slot in slots]
            for slot, line, values in zip(slots, lines, file.read(lines), strict=True):
                if not isinstance(values, bool):
                    place = (f"{short}:{line + 1}", f"{file.path}, line {line + 1}") if short is not None else ()
                    found[slot] = RawRow(line + 1, values, *place)
        return found


def size_of(files: Sequence[Path]) -> int:
    """Bytes of some files."""
    return sum(os.path.getsize(file) for file in files)
