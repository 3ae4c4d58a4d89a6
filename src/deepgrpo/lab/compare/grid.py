"""Trials of the tuning stage: the values of the grid that each arm tries. No torch.

    grid = { optim.lr = [1e-4, 3e-4], optim.warmup_steps = [0, 20] }     four trials per arm, one run per trial and seed
    an arm that sets optim.lr itself                                     two trials: only warmup_steps is tuned for it
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Value = bool | int | float | str
"""A value of the grid."""
Grid = Mapping[str, tuple[Value, ...]]
"""Dotted key → values to try."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of the grid. Example: Trial("lr=0.0001,warmup_steps=20", {"optim.lr": 1e-4, "optim.warmup_steps": 20})."""

    name: str
    """Directory of its runs."""
    values: Mapping[str, Value]

    def changes(self) -> dict[str, Any]:
        """The values as changes to a recipe."""
        return nested(self.values)


def fixed_values(grid: Grid, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the grid that an arm sets itself, which are not tuned for it, with the arm's values."""
    own = dict(flatten(changes))
    return {key: own[key] for key in grid if key in own}


def trials_of(grid: Grid, changes: Mapping[str, Any]) -> tuple[Trial, ...]:
    """The trials of an arm, values in the order of the grid, the last key fastest; none if the arm sets all keys itself."""
    tuned = {key: values for key, values in grid.items() if key not in fixed_values(grid, changes)}
    if not tuned:
        return ()
    short = short_names(grid)
    return tuple(
        Trial(",".join(f"{short[key]}={label(value)}" for key, value in zip(tuned, point, strict=True)),
              dict(zip(tuned, point, strict=True)))
        for point in itertools.product(*tuned.values())
    )  # fmt: skip


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each key, or the whole key where two keys end alike."""
    keys = list(keys)
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def label(value: Value) -> str:
    """A value as text: 0.0001 for 1e-4, 5e-05, 20, true."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key as nested tables.

    >>> nested({"optim.lr": 0.1, "optim.warmup_steps": 20})
    {'optim': {'lr': 0.1, 'warmup_steps': 20}}
    """
    found: dict[str, Any] = {}
    for dotted, value in values.items():
        *sections, key = dotted.split(".")
        table = found
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = value
    return found


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables by dotted key."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
