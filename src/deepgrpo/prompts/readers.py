"""Readers of JSONL, parquet and Hugging Face data sets, at most `data.limit` rows each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from deepgrpo.config import HubData, JsonlData, ParquetData
from deepgrpo.errors import DataError, MissingExtraError, first_line
from deepgrpo.prompts.jsonl import existing, read_jsonl
from deepgrpo.prompts.rows import QuestionRow, RawRow, pick

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def jsonl_rows(data: JsonlData, skipped: Counter[str]) -> list[QuestionRow]:
    """Usable rows of a JSONL file, see `rows.pick`."""
    return pick(read_jsonl(data.path, data.limit), data.columns, data.path, "line", skipped)


def parquet_rows(data: ParquetData, skipped: Counter[str]) -> list[QuestionRow]:
    """Usable rows of a parquet file, see `rows.pick`."""
    return pick(_read_parquet(data), data.columns, data.path, "row", skipped)


def hub_rows(data: HubData, skipped: Counter[str]) -> list[QuestionRow]:
    """Usable rows of a Hugging Face data set, see `rows.pick`."""
    return pick(_read_hub(data), data.columns, f"{data.path} ({data.split})", "row", skipped)


def _read_parquet(data: ParquetData) -> Iterator[RawRow]:
    """Rows of a parquet file. Raises DataError if it is unreadable, MissingExtraError without pyarrow."""
    path = existing(data.path)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data", 'data.type = "parquet"') from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            short = [field.name for field in file.schema_arrow if str(field.type) in ("float", "halffloat")]
            rows = (_with_own_digits(row, short) for batch in file.iter_batches() for row in _python_rows(batch))
            yield from (RawRow(number, row) for number, row in enumerate(islice(rows, data.limit), start=1))
    # besides ArrowException: nanoseconds, time zones, repeated names of columns
    except Exception as error:
        raise DataError(f"{data.path} is not a readable parquet file: {first_line(error)}; write it again") from error


def _python_rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """Rows of a batch; None for a row with a text that is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def _because(error: BaseException) -> str:
    """The first cause of an error, which a builder hides behind one of its own."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return "" if cause is error else f" ({type(cause).__name__}: {first_line(cause)})"


def _with_own_digits(row: dict[str, Any] | None, short: Sequence[str]) -> dict[str, Any] | None:
    """A row whose float32 columns hold 0.1 where Python would widen it to 0.10000000149011612."""
    if row is None or not short:
        return row
    return {**row, **{name: float(str(np.float32(row[name]))) for name in short if row[name] is not None}}


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
            f"the data set ({what}) cannot be loaded: {type(error).__name__}: {error}{_because(error)}; "
            "check the three, and the network if it is a hub name"
        ) from error
    try:
        # a saved data set may ask for tensors instead of plain values
        plain = loaded.with_format(None)
        types = {name: getattr(feature, "dtype", None) for name, feature in (plain.features or {}).items()}
        short = [name for name, dtype in types.items() if dtype in ("float32", "float16")]
        rows = (_with_own_digits(row, short) for row in plain)
        yield from (RawRow(number, row) for number, row in enumerate(islice(rows, data.limit), start=1))
    except Exception as error:  # pictures and sounds are decoded here
        raise DataError(
            f"a row of the data set {data.path!r} cannot be read: {type(error).__name__}: {first_line(error)}; repair it, or "
            "remove the column"
        ) from error
