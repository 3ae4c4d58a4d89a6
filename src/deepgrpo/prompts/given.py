"""Rows of the Python program that trains: a list of dicts, a `datasets.Dataset`, a data frame."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from deepgrpo.config import GivenData
from deepgrpo.errors import DataError
from deepgrpo.loading import not_given, show
from deepgrpo.prompts.rows import QuestionRow, RawRow, pick

_SOURCE = "dataset"


def given_rows(data: GivenData, skipped: Counter[str]) -> list[QuestionRow]:
    """Rows that the section holds, in order; see `prompts.rows.pick`.

    Raises DataError if they are no rows, ConfigError if the section holds none.
    """
    if data.held is None:
        raise not_given("data.type", "the dataset")
    return pick(islice(_raw(data.held), data.limit), data.columns, _SOURCE, "row", skipped)


def first_row(dataset: Any) -> Mapping[str, Any]:
    """The first row; empty if there is none. Raises DataError if it is no row."""
    raw = next(_raw(dataset), None)
    return {} if raw is None or raw.values is None else raw.values


def _raw(dataset: Any) -> Iterator[RawRow]:
    for number, row in enumerate(_rows(dataset), start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{_SOURCE}, row {number} is {show(row)}; a row is a dict from column to value")
        yield RawRow(number, dict(row))


def _rows(dataset: Any) -> Iterator[Any]:
    if isinstance(dataset, Mapping):  # a DatasetDict
        raise DataError(
            f"{_SOURCE} is a {type(dataset).__name__} with the keys {', '.join(map(str, dataset))}; choose one split, e.g. "
            f'dataset["{next(iter(dataset), "train")}"]'
        )
    if hasattr(dataset, "with_format") and hasattr(dataset, "column_names"):  # datasets.Dataset
        if not hasattr(dataset, "__len__"):
            raise DataError(
                f"{_SOURCE} is a {type(dataset).__name__}, which is read once and never whole; pass its rows, "
                'list(dataset.take(N)), or name the source in the recipe: data.type = "hf"'
            )
        return iter(dataset.with_format(None))
    if hasattr(dataset, "to_dict") and hasattr(dataset, "columns"):  # pandas.DataFrame
        return iter(dataset.to_dict("records"))
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(f"{_SOURCE} is {show(dataset)}; pass a list of dicts, a datasets.Dataset or a data frame")
    return (dataset[index] for index in range(len(dataset)))
