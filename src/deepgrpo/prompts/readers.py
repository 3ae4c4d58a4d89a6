"""Readers of JSONL, parquet and Hugging Face data sets, at most `data.limit` rows each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from deepgrpo.config import HubData, JsonlData, ParquetData
from deepgrpo.errors import DataError, first_line, requires_extra
from deepgrpo.prompts.jsonl import read_jsonl
from deepgrpo.prompts.rows import QuestionRow, RawRow, pick
from deepgrpo.prompts.shards import files_of, is_saved, names_of

PARQUET_ENDINGS = (".parquet",)
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
    """Rows of the files of a path, at most `limit`.

    Raises DataError if one is unreadable, MissingExtraError without pyarrow.
    """
    files = files_of(data.path, PARQUET_ENDINGS)
    rows = (
        RawRow(number, row, *((f"{short}:{number}", f"{file}, row {number}") if len(files) > 1 else ()))
        for file, short in zip(files, names_of(files), strict=True)
        for number, row in enumerate(_parquet_file(file, str(file) if len(files) > 1 else data.path), start=1)
    )
    return islice(rows, data.limit)


def _parquet_file(path: Path, name: str) -> Iterator[dict[str, Any] | None]:
    with requires_extra("pyarrow", "data", 'data.type = "parquet"'):
        import pyarrow
        import pyarrow.parquet
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            short = [field.name for field in file.schema_arrow if str(field.type) in ("float", "halffloat")]
            yield from (with_own_digits(row, short) for batch in file.iter_batches() for row in _python_rows(batch))
    # besides ArrowException: nanoseconds, time zones, repeated names of columns
    except Exception as error:
        raise DataError(f"{name} is not a readable parquet file: {first_line(error)}; write it again") from error


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


def with_own_digits(row: dict[str, Any] | None, short: Sequence[str]) -> dict[str, Any] | None:
    """A row whose float32 columns hold 0.1 where Python would widen it to 0.10000000149011612."""
    if row is None or not short:
        return row
    return {**row, **{name: float(str(np.float32(row[name]))) for name in short if row[name] is not None}}


def _read_hub(data: HubData) -> Iterator[RawRow]:
    """Rows of a Hugging Face data set, at most `limit`. Raises DataError, see `load_hub`."""
    loaded = load_hub(data)
    try:
        rows = islice(plain_rows(loaded), data.limit)
        yield from (RawRow(number, row) for number, row in enumerate(rows, start=1))
    except Exception as error:  # pictures and sounds are decoded here
        raise unreadable_row(data.path, error) from error


def load_hub(data: HubData, *, streaming: bool = False) -> Any:
    """A Hugging Face data set: a hub name, a directory (of files, or from `save_to_disk`), or a single file.

    Args:
        data: the section.
        streaming: an `IterableDataset`, which reads rows in order, without a copy on disk. A folder of `save_to_disk` is a
            `Dataset` all the same: its rows stay on disk.

    Raises DataError if loading fails, MissingExtraError without datasets.
    """
    with requires_extra("datasets", "data", 'data.type = "hf"'):
        import datasets
    path = Path(data.path).expanduser()
    how: dict[str, Any] = {"split": data.split, "streaming": streaming}
    try:
        if is_saved(path):
            loaded: Any = datasets.load_from_disk(str(path))
            return loaded[data.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        if path.is_file() and path.suffix in _BUILDERS:
            # a single file is one split, which the builder would call "train"
            return datasets.load_dataset(_BUILDERS[path.suffix], data_files={data.split: str(path)}, **how)
        return datasets.load_dataset(str(path) if path.exists() else data.path, data.name, **how)
    except Exception as error:  # the hub client, the builders and pyarrow have no common base error
        what = f"data.path = {data.path!r}, data.name = {data.name!r}, data.split = {data.split!r}"
        raise DataError(
            f"the data set ({what}) cannot be loaded: {type(error).__name__}: {error}{_because(error)}; "
            "check the three, and the network if it is a hub name"
        ) from error


def plain_rows(loaded: Any) -> Iterator[dict[str, Any] | None]:
    """Rows of a data set as plain values: a saved one may ask for tensors."""
    short = short_floats(loaded)
    return (with_own_digits(row, short) for row in loaded.with_format(None))


def short_floats(loaded: Any) -> list[str]:
    """Columns of a data set with numbers of 32 bits or fewer."""
    types = {name: getattr(feature, "dtype", None) for name, feature in (loaded.features or {}).items()}
    return [name for name, dtype in types.items() if dtype in ("float32", "float16")]


def unreadable_row(path: str, error: Exception) -> DataError:
    """The error for a row that cannot be decoded."""
    return DataError(
        f"a row of the data set {path!r} cannot be read: {type(error).__name__}: {first_line(error)}; repair it, or "
        "remove the column"
    )
