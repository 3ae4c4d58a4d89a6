"""Rows of Arrow tables on disk: parquet shards and `save_to_disk` folders, mapped into memory by `datasets`.

Parquet is converted once into an Arrow file in the cache of `datasets` (HF_DATASETS_CACHE): a row of parquet cannot be read
without its whole row group.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepgrpo.errors import DataError, requires_extra
from deepgrpo.prompts.readers import short_floats, unreadable_row, with_own_digits
from deepgrpo.prompts.rows import RawRow

_SAMPLED = 64
"""Rows that the digest covers, evenly spread."""


class ArrowRows:
    """Rows of a `datasets.Dataset` by address; see `streamed.Rows`."""

    def __init__(self, loaded: Any, name: str, covered: str = "") -> None:
        self._rows, self._name, self._short = loaded.with_format(None), name, short_floats(loaded)
        self.count = len(loaded)
        digest = hashlib.blake2b(f"{covered} {self.count} {loaded.features}".encode(), digest_size=16)
        places = np.linspace(0, self.count - 1, min(_SAMPLED, self.count)).astype(int).tolist()
        for row in self.fetch(places):
            digest.update(json.dumps(row and row.values, default=str, sort_keys=True).encode("utf-8", "surrogatepass"))
        self.digest = digest.hexdigest()

    def fetch(self, numbers: Sequence[int]) -> list[RawRow | None]:
        """See `Rows.fetch`. Raises DataError for a row that cannot be decoded."""
        try:
            return [RawRow(number + 1, with_own_digits(self._row(number), self._short)) for number in numbers]
        except Exception as error:  # pictures and sounds are decoded here
            raise unreadable_row(self._name, error) from error

    def _row(self, number: int) -> dict[str, Any] | None:
        try:
            row: dict[str, Any] = self._rows[number]
        except UnicodeDecodeError:
            return None
        return row


def mapped_parquet(files: Sequence[Path], name: str) -> Any:
    """A `datasets.Dataset` of parquet files. Raises DataError if one is unreadable, MissingExtraError without datasets."""
    with requires_extra("datasets", "data", "data.streaming"):
        import datasets
    try:
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except Exception as error:  # the builders and pyarrow have no common base error
        raise DataError(f"{name} is not readable parquet: {type(error).__name__}: {error}; write it again") from error
