"""The choice between loading a source whole and reading its rows when they are needed, and the reader for the latter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepgrpo.config import DataConfig, HubData, JsonlData, ParquetData
from deepgrpo.prompts.arrow import ArrowRows, mapped_parquet
from deepgrpo.prompts.jsonl import ENDINGS
from deepgrpo.prompts.lines import LineRows, size_of
from deepgrpo.prompts.readers import PARQUET_ENDINGS, load_hub
from deepgrpo.prompts.shards import files_of, is_saved
from deepgrpo.prompts.streamed import AddressedReader, Reader, Rows
from deepgrpo.prompts.windows import WindowedReader

LARGE_JSONL = 1 << 30
"""Bytes of JSONL from which rows are read when they are needed, unless `data.streaming` says otherwise."""
LARGE_COLUMNS = 1 << 28
"""The same for parquet and Arrow files, whose rows take more room in memory."""


def open_reader(data: DataConfig, *, seed: int, shuffle: bool) -> Reader | None:
    """The reader of a source whose rows are read when they are needed; None for one that is loaded whole.

    Raises DataError or MissingExtraError, see `files_of`, `index_lines`, `mapped_parquet` and `load_hub`.
    """
    how: dict[str, Any] = {"seed": seed, "shuffle": shuffle}
    if isinstance(data, JsonlData) and wants_streaming(data):
        lines = LineRows(files_of(data.path, ENDINGS), data.path)
        return AddressedReader(lines, data.path, "line", limit=data.limit, **how)
    if isinstance(data, ParquetData) and wants_streaming(data):
        files = files_of(data.path, PARQUET_ENDINGS)
        covered = " ".join(str(file.stat().st_size) for file in files)
        rows: Rows = ArrowRows(mapped_parquet(files, data.path), data.path, covered)
        return AddressedReader(rows, data.path, "row", limit=data.limit, **how)
    if isinstance(data, HubData) and wants_streaming(data):
        loaded, name = load_hub(data, streaming=True), f"{data.path} ({data.split})"
        if hasattr(loaded, "__len__"):
            return AddressedReader(ArrowRows(loaded, name), name, "row", limit=data.limit, **how)
        return WindowedReader(loaded, name, window=data.shuffle_window, limit=data.limit, **how)
    return None


def wants_streaming(data: JsonlData | ParquetData | HubData) -> bool:
    """`data.streaming`; by default true for large files that can be streamed, if no `data.limit` bounds them."""
    if data.streaming is not None:
        return data.streaming
    if data.limit is not None:
        return False
    if isinstance(data, HubData):  # what only the hub knows is not asked for
        path = Path(data.path).expanduser()
        return is_saved(path) and size_of(sorted(path.rglob("*.arrow"))) > LARGE_COLUMNS
    if isinstance(data, JsonlData):
        files = files_of(data.path, ENDINGS)
        return size_of(files) > LARGE_JSONL and not any(file.suffix == ".gz" for file in files)
    return size_of(files_of(data.path, PARQUET_ENDINGS)) > LARGE_COLUMNS
