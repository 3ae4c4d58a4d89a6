"""Columns by path: `reward_model.ground_truth`, `prompt.1.content`, `prompt.-1.content`; names that have dots of their own.

    path        a key of a table, or the index of a list (negative: from its end), at every dot
    exact name  a key that equals the path, or the longest part of it, comes first: a column "a.b" hides b in a column "a"
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

_INDEX = re.compile(r"-?\d+")
_DEEPEST = 3
"""Most dots in a path that a message lists."""
SHOWN = 40
"""Most paths that a message lists."""


class _Missing:
    """Type of `MISSING`."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()
"""Value of a path that the row does not have; null is a value."""


def value_at(row: Any, path: str) -> Any:
    """The value at a path, or MISSING.

    >>> row = {"prompt": [{"content": "1 + 1?"}], "a": {"b": 1}, "c.d": 2}
    >>> value_at(row, "prompt.-1.content"), value_at(row, "a.b"), value_at(row, "c.d"), value_at(row, "a.c")
    ('1 + 1?', 1, 2, MISSING)
    """
    return _descend(row, path.split("."))


def _descend(value: Any, parts: Sequence[str]) -> Any:
    if not parts:
        return value
    if isinstance(value, Mapping):
        for length in range(len(parts), 0, -1):
            name = ".".join(parts[:length])
            if name in value and (found := _descend(value[name], parts[length:])) is not MISSING:
                return found
    elif isinstance(value, list | tuple | np.ndarray) and _INDEX.fullmatch(parts[0]):
        index = int(parts[0])
        if -len(value) <= index < len(value):
            return _descend(value[index], parts[1:])
    return MISSING


def paths_of(row: Any, depth: int = _DEEPEST) -> Iterator[str]:
    """All paths of a row, columns before what is in them; of a list of tables, those of its first and last one.

    >>> list(paths_of({"id": 1, "reward_model": {"style": "rule", "ground_truth": "72"}}))
    ['id', 'reward_model', 'reward_model.style', 'reward_model.ground_truth']
    """
    if isinstance(row, Mapping):
        inner = [(str(name), value) for name, value in row.items()]
    elif isinstance(row, list | tuple) and row and isinstance(row[0], Mapping):
        inner = [(str(index), row[index]) for index in ((0, -1) if len(row) > 1 else (0,))]
    else:
        return
    for name, value in inner:
        yield name
        if depth:
            yield from (f"{name}.{path}" for path in paths_of(value, depth - 1))


def nearest(path: str, known: Sequence[str]) -> str | None:
    """The path that was probably meant: one with the same last name, else the one spelled most alike."""
    last = path.rpartition(".")[2].lower()
    same = [each for each in known if each.rpartition(".")[2].lower() == last]
    if same:
        return same[0]
    lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(path.lower(), lower, n=1)
    return lower[close[0]] if close else None


def listed(known: Sequence[str]) -> str:
    """Paths for a message, at most `SHOWN`."""
    return ", ".join(known[:SHOWN]) + (", ..." if len(known) > SHOWN else "") if known else "(none)"
