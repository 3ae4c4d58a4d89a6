"""Values of the command line, read by the type of their key: `--run.name 2024` is a string, `--run.seed 2024` a number."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from deepgrpo.config.base import entries_of, tables_of


def read_value(text: str, kinds: Sequence[Any]) -> Any:
    """Read a value as TOML; as a string if the key takes strings only, or if it is no TOML, such as a bare word.

    The words none and null, which TOML lacks, remove a value where it may be absent.

    Args:
        kinds: types and literal values that the key takes (`key_kinds`); empty if they are not known.

    >>> read_value("2024", [str]), read_value("2024", [int]), read_value("none", [str, NoneType]), read_value("none", ["none"])
    ('2024', 2024, None, 'none')
    """
    if text in kinds:
        return text
    if text.lower() in ("none", "null") and (NoneType in kinds or str not in kinds):
        return None
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return text if str in kinds and type(value) not in kinds else value


def key_kinds(key: Sequence[str], raw: Mapping[str, Any], root: type[BaseModel]) -> list[Any]:
    """Types and literal values that a key of a recipe takes; empty for an unknown key, or one of a free table.

    Args:
        key: e.g. ["explore", "num_rollouts"].
        raw: the recipe so far; `type` in its tables says which kind of section a table is.
    """
    sections: list[type[BaseModel]] = [root]
    table: Any = raw
    annotations: list[Any] = []
    for part in key:
        named = [entry for annotation in annotations if (entry := entries_of(annotation)) is not None]
        if named:  # the part is a free name, or a number in a list
            sections = [section for entry in named for section in tables_of(entry)]
            annotations = []
            table = _entry(table, part)
            continue
        kind = table.get("type") if isinstance(table, Mapping) else None
        chosen = [s for s in sections if "type" in s.model_fields and s.model_fields["type"].default == kind] or sections
        fields = [(f"{info.alias or name}", info) for section in chosen for name, info in section.model_fields.items()]
        annotations = [info.annotation for name, info in fields if name == part]
        sections = [section for annotation in annotations for section in tables_of(annotation)]
        table = _entry(table, part)
    return [kind for annotation in annotations for kind in _kinds(annotation)]


def _entry(table: Any, part: str) -> Any:
    if isinstance(table, list):
        return table[int(part)] if part.isdecimal() and int(part) < len(table) else None
    return table.get(part) if isinstance(table, Mapping) else None


def _kinds(annotation: Any) -> list[Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(arguments[0])
    if origin in (Union, UnionType):
        return [kind for part in arguments for kind in _kinds(part)]
    return list(arguments) if origin is Literal else [origin or annotation]
