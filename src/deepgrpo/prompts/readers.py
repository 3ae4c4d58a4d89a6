"""Readers of JSONL, parquet and Hugging Face data sets, at most `data.limit` rows each."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from deepgrpo.config import HubData, JsonlData, ParquetData
from deepgrpo.errors import DataError, MissingExtraError
from deepgrpo.prompts.rows import QuestionRow, RawRow, pick

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def jsonl_rows(data: JsonlData, skipped: Counter[str]) -> list[QuestionRow]:
    """Usable rows of a JSONL file, see `rows.pick`."""
    return pick(_read_jsonl(data), data.columns, data.path, "line", skipped)


def parquet_rows(data: ParquetData, skipped: Counter[str]) -> list[QuestionRow]:
    """Usable rows of a parquet file, see `rows.pick`."""
    return pick(_read_parquet(data), data.columns, data.path, "row", skipped)


def hub_rows(data: HubData, skipped: Counter[str]) -> list[QuestionRow]:
    """Usable rows of a Hugging Face data set, see `rows.pick`."""
    return pick(_read_hub(data), data.columns, f"{data.path} ({data.split})", "row", skipped)


def _read_jsonl(data: JsonlData) -> Iterator[RawRow]:
    """One row per non-blank line. A line that is not UTF-8 yields a row without values.

    Raises DataError: the file is unreadable, or a line is not a JSON object.
    """
    path = _existing(data.path)
    count = 0
    with path.open("rb") as file:
        # bytes, split at \n only: text mode would stop at the first invalid byte
        for number, line in enumerate(file, start=1):
            if data.limit is not None and count == data.limit:
                return
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            count += 1
            yield RawRow(number, _parse(line, data.path, number))


def _read_parquet(data: ParquetData) -> Iterator[RawRow]:
    """Rows of a parquet file. Raises DataError if it is unreadable, MissingExtraError without pyarrow."""
    path = _existing(data.path)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data", 'data.type = "parquet"') from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from (RawRow(number, row) for number, row in enumerate(islice(rows, data.limit), start=1))
    except pyarrow.ArrowException as error:
        raise DataError(f"{data.path} is not a readable parquet file: {error}; write it again") from error


def _read_hub(data: HubData) -> Iterator[RawRow]:
    """Rows of a Hugging Face data set: a hub name, a directory (of files, or from `save_to_disk`), or a single file.

    Raises DataError if loading fails, MissingExtraError without datasets.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "data", 'data.type = "hf"') from None
    path = Path(data.path).expanduser()
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded: Any = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[data.split]
        elif path.is_file() and path.suffix in _BUILDERS:
            # a single file is one split, which the builder would call "train"
            loaded = datasets.load_dataset(_BUILDERS[path.suffix], data_files={data.split: str(path)}, split=data.split)
        else:
            name = str(path) if path.exists() else data.path
            loaded = datasets.load_dataset(name, data.name, split=data.split)
    except Exception as error:  # the hub client, the builders and pyarrow have no common base error
        what = f"data.path = {data.path!r}, data.name = {data.name!r}, data.split = {data.split!r}"
        raise DataError(
            f"the data set ({what}) cannot be loaded: {type(error).__name__}: {error}; "
            "check the three, and the network if it is a hub name"
        ) from error
    yield from (RawRow(number, row) for number, row in enumerate(islice(loaded, data.limit), start=1))


def _parse(line: bytes, source: str, number: int) -> dict[str, Any] | None:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{source}, line {number} is not valid JSON: {error} ({text.strip()[:60]!r}); "
            "repair or delete the line (a JSONL file has one object per line)"
        ) from None
    if not isinstance(row, dict):
        raise DataError(
            f"{source}, line {number} is a JSON {type(row).__name__} ({text.strip()[:60]!r}), not an object; "
            'write {"question": ..., "answer": ...} on every line'
        )
    return row


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        raise DataError(f"data.path {name!r} is a directory; name a file in it")
    if not path.exists():
        raise DataError(
            f"data.path {name!r} does not exist (looked for {path.resolve()}); a relative path starts where you run"
        )
    if not os.access(path, os.R_OK):
        raise DataError(f"data.path {name!r} may not be read; change its permissions")
    return path
