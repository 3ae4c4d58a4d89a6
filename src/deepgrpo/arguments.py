"""Arguments of a command before the parser reads them: overrides of recipe keys, default values, home directories. No torch"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from deepgrpo.config.explain import section_names
from deepgrpo.errors import ConfigError

Overrides = list[tuple[str, str]]
"""Recipe keys with their values, as given: [("optim.lr", "1e-5")]."""


def split_overrides(arguments: Sequence[str], *, sections: bool = True) -> tuple[list[str], Overrides]:
    """Separate `--section.key VALUE` and `--section.key=VALUE` pairs from the other arguments.

    An override is an option with a dot in its name or, with `sections`, one named like a section of the recipe. All
    others are left to the parser, so a misspelt option is an error and never an override.

    >>> split_overrides(["demo", "--optim.lr", "1e-5", "--dry-run", "--warmstart=none"])
    (['demo', '--dry-run'], [('optim.lr', '1e-5'), ('warmstart', 'none')])

    Raises ConfigError if a value is missing.
    """
    rest: list[str] = []
    overrides: Overrides = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not ("." in key or (sections and key in section_names())):
            rest.append(argument)
            continue
        if not equals:
            # a single dash may start a negative number; two start the next option
            if not waiting or waiting[0].startswith("--"):
                raise ConfigError(f"--{key} has no value; write --{key} VALUE")
            value = waiting.pop(0)
        overrides.append((key, value))
    return rest, overrides


def give_value(arguments: Sequence[str], option: str, value: str) -> list[str]:
    """Insert a default value after an option given without one."""
    given = list(arguments)
    if option in given:
        after = given.index(option) + 1
        if after == len(given) or given[after].startswith("-"):
            given.insert(after, value)
    return given


def expand_homes(options: Any) -> Any:
    """Replace ~/ and ~user/ at the start of every option: a shell leaves it in `--json=~/figures.json`, or in quotes."""

    def expanded(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(expanded, value))
        if isinstance(value, Path):
            return value.expanduser()
        return os.path.expanduser(value) if isinstance(value, str) and re.match(r"~[\w.-]*/", value) else value

    return replace(options, **{each.name: expanded(getattr(options, each.name)) for each in fields(options)})
