"""Relative paths of a run's recipe, found again from another working directory, or after the run was moved.

    RUN/place.json   {"run": "/home/me/sums/runs/demo", "working_directory": "/home/me/sums"}

A relative path of the recipe begins in the directory in which the run was started. A reader looks for it in this order: in the
directory that lies to the run as that one did, in that one itself, in the present working directory. So a run can be continued
from anywhere, and moved: alone, or together with the data beside it.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from deepgrpo.config import Config, load_recipe, parse_config, to_tables, to_toml
from deepgrpo.config.base import Section
from deepgrpo.config.files import override
from deepgrpo.errors import ConfigError
from deepgrpo.runs.files import replace_file
from deepgrpo.runs.layout import RunDir


def write_recipe(run: RunDir, config: Config) -> None:
    """Write the recipe of a run, and where its relative paths begin. Raises OSError."""
    replace_file(run.config, to_toml(config))
    here = {"run": str(run.path.absolute()), "working_directory": os.getcwd()}
    replace_file(run.place, json.dumps(here, indent=1) + "\n")


def load_run_recipe(run: RunDir, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """The recipe of a run, with paths that can be read from the present working directory.

    Args:
        overrides: changes of the command line, whose paths begin in the present working directory.

    Raises ConfigError, see `load_recipe`.
    """
    try:
        config = load_recipe(run.config)
    except ConfigError:
        if not overrides:
            raise
        return load_recipe(run.config, overrides)  # they may repair it
    found = _found(config, _places(run))
    if found == config and not overrides:
        return config
    raw = to_tables(found)
    override(raw, overrides)
    return parse_config(raw, source=str(run.config))


def moved_paths(run: RunDir) -> list[str]:
    """A sentence for each relative path of a run's recipe that is found elsewhere than in the present working directory.

    Raises ConfigError, see `load_recipe`.
    """
    config = load_recipe(run.config)
    before, now = _flat(to_tables(config)), _flat(to_tables(_found(config, _places(run))))
    return [f"{key} = {before[key]!r} is {now[key]}" for key in before if before[key] != now[key]]


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: each for part, inner in pairs for name, each in _flat(inner, f"{key}.{part}".lstrip(".")).items()}
    return {key: value}


def _places(run: RunDir) -> list[Path]:
    """Directories where a relative path of the recipe may begin, the likeliest first."""
    here = Path.cwd()
    try:
        noted = json.loads(run.place.read_text(encoding="utf-8"))
        began, at = Path(noted["working_directory"]), Path(noted["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return [here]
    return [Path(os.path.normpath(run.path.absolute() / os.path.relpath(began, at))), began, here]


def _found(section: Any, places: Sequence[Path]) -> Any:
    """A section, or a tuple of them, whose relative paths are those of a place where they exist."""
    if isinstance(section, tuple | list):
        return type(section)(_found(each, places) for each in section)
    if not isinstance(section, Section):
        return section
    changes: dict[str, Any] = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, str) and _is_path(info):
            changes[name] = _readable(value, places)
        elif isinstance(value, Section | tuple | list) and name != "run":
            changes[name] = _found(value, places)
    changed = {name: value for name, value in changes.items() if value != getattr(section, name)}
    return section.model_copy(update=changed) if changed else section


def _is_path(info: FieldInfo) -> bool:
    """True for a key of the type `config.base.PathText`, or of it and none."""
    kinds = [*info.metadata, *(kind for each in get_args(info.annotation) for kind in get_args(each)[1:])]
    return any(getattr(kind, "func", None) is os.path.expanduser for kind in kinds)


def _readable(value: str, places: Sequence[Path]) -> str:
    """A relative path, or FILE.py:NAME, as it can be read from here; unchanged if it exists nowhere."""
    path, colon, rest = value.rpartition(":") if ".py:" in value else (value, "", "")
    if not path or os.path.isabs(path):
        return value
    for place in places:
        there = place / path
        if os.path.lexists(there) or glob.glob(str(there)):
            return value if place == Path.cwd() else f"{there}{colon}{rest}"
    return value
