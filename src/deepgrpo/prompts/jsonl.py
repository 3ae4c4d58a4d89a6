"""JSONL files: one JSON object per line, plain or gzipped, with or without byte order marks; other files are named.

A line that is not UTF-8 gives a row without values, which is counted as bad encoding. Everything else that is wrong with a
line or a file is an error with its place and the remedy.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any

from deepgrpo.errors import DataError
from deepgrpo.prompts.rows import RawRow
from deepgrpo.prompts.shards import files_of, names_of

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_OTHER_FORMATS = {
    b"PAR1": 'is a parquet file; set data.type = "parquet"',
    b"PK\x03\x04": "is a zip file; unpack it",
    b"\x28\xb5\x2f\xfd": "is a zstd file; unpack it",
    b"BZh": "is a bzip2 file; unpack it",
    b"\xfd7zXZ": "is an xz file; unpack it",
}
_UTF_16 = "is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW.jsonl"
_UTF_32 = "is UTF-32, not UTF-8; convert it: iconv -f UTF-32 -t UTF-8 FILE > NEW.jsonl"


ENDINGS = (".jsonl", ".jsonl.gz")
"""Endings of the files that count in a directory."""


def first_row(name: str) -> Mapping[str, Any]:
    """The first row that can be read, for its columns; empty if there is none, which reading the data will report."""
    try:
        return next((row.values for row in read_jsonl(name) if row.values is not None), {})
    except DataError:
        return {}


def read_jsonl(name: str, limit: int | None = None) -> Iterator[RawRow]:
    """One row per non-blank line of the files of a path, at most `limit`. A line that is not UTF-8 yields a row without values.

    Raises DataError: a file is unreadable or has another format, or a line is not a JSON object.
    """
    files = files_of(name, ENDINGS)
    rows = (
        RawRow(number, values, *((f"{short}:{number}", f"{file}, line {number}") if len(files) > 1 else ()))
        for file, short in zip(files, names_of(files), strict=True)
        for number, values in _read_file(file, str(file) if len(files) > 1 else name)
    )
    return islice(rows, limit)


def _read_file(path: Path, name: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    try:
        with _opened(path) as file:
            refuse_other_formats(file, name)
            # bytes, split at \n only: text mode would stop at the first invalid byte
            for number, line in enumerate(file, start=1):
                # also inside the file: it may be two files joined
                if line.removeprefix(_BOM).strip():
                    yield number, parse_line(line, name, number)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data.path {name!r} cannot be read: {error}; repair the file or write it again") from error


def _opened(path: Path) -> BufferedReader | gzip.GzipFile:
    file = path.open("rb")
    # peek: a pipe has no way back
    return gzip.GzipFile(fileobj=file, mode="rb") if file.peek(2).startswith(_GZIP) else file


def refuse_other_formats(file: BufferedReader | gzip.GzipFile, name: str) -> None:
    """Raise DataError for a file that is no UTF-8 JSONL; leaves the file at its start."""
    start = file.peek(4096)
    for mark, what in _OTHER_FORMATS.items():
        if start.startswith(mark):
            raise DataError(f"{name} {what}")
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        raise DataError(f"{name} {_UTF_32}")
    # without a mark: the bracket that starts an object, in two bytes
    if start.startswith((b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{", b"[\0", b"\0[")):
        raise DataError(f"{name} {_UTF_16}")
    if start.removeprefix(_BOM).lstrip().startswith(b"["):
        raise DataError(
            f"{name} is a JSON array, and a JSONL file has one object per line; convert it: jq -c '.[]' FILE > NEW.jsonl"
        )


def parse_line(line: bytes, source: str, number: int) -> dict[str, Any] | None:
    """The row of a line; None if it is not UTF-8. Raises DataError if it is no JSON object."""
    line = line.removeprefix(_BOM)
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(text.strip(), f"{source}, line {number}", error) from None
    if not isinstance(row, dict):
        raise DataError(
            f"{source}, line {number} is a JSON {type(row).__name__} ({text.strip()[:60]!r}), not an object; "
            'write {"question": ..., "answer": ...} on every line'
        )
    return row


def _not_json(text: str, where: str, error: Exception) -> DataError:
    if text.endswith("},"):
        return DataError(f"{where} ends with a comma; delete the comma (a JSONL file has one object per line)")
    if "}\r{" in text:
        return DataError(
            f"{where} has a carriage return between two objects; convert it: tr '\\r' '\\n' < FILE > NEW.jsonl"
        )
    return DataError(
        f"{where} is not valid JSON: {error} ({text[:60]!r}); "
        "repair or delete the line (a JSONL file has one object per line)"
    )
