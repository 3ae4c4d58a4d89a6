"""Validation problems as sentences: key, value, remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from deepgrpo.config.base import Section, entries_of, tables_of
from deepgrpo.errors import ConfigError

Parsed = TypeVar("Parsed", bound=Section)


def parse_section(model: type[Parsed], raw: Mapping[str, Any], source: str) -> Parsed:
    """Validate a nested dict against a section, with the same errors as for a recipe."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(problem, model) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys([f"{source}: {line}" for line in lines]))) from None


def _explain(problem: Any, root: type[BaseModel]) -> str:
    """One pydantic problem as a sentence with key, value and remedy."""
    # a discriminated union puts its tag into the location; drop it, because users do not write it
    location = [str(part) for part in problem["loc"]]
    names = _strip_tags(location, root)
    key = ".".join(names)
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        known = fields_at(location[:-1], root)
        close = difflib.get_close_matches(names[-1], known, n=1)
        hint = f"did you mean {'.'.join([*names[:-1], close[0]])!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r} (value {value!r}); {hint}"
    if kind == "missing":
        return f"key {key!r} is missing; add it"
    if kind == "union_tag_invalid":
        given = problem["ctx"]["tag"]
        expected = problem["ctx"]["expected_tags"]
        close = difflib.get_close_matches(given, expected.replace("'", "").split(", "), n=1)
        return f"{key}.type is {given!r}; choose one of {expected}" + (f" (did you mean {close[0]!r}?)" if close else "")
    if kind == "union_tag_not_found":
        return f"{key}.type is missing; add it to say which kind of {names[-1]} this is"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return in_place(message, _reward_in(names))
    message = _SHAPES.get(kind) or message.removeprefix("Input should be ")
    if kind == "string_type":
        message = "a string" if value is None or isinstance(value, list | dict) else f"a string: write {_quoted(value)}"
    if kind == "tuple_type" and isinstance(value, str | int | float):
        message = f"a list: write [{value if not isinstance(value, str) else _quoted(value)}]"
    shown = "none" if value is None else repr(value)
    return f"{key} is {shown}; it should be {message}"


def in_place(message: str, where: str) -> str:
    """A message about the section `reward` with the keys of another place that holds a reward, such as `reward.parts.NAME`."""
    return re.sub(r"(?<![\w.])reward\.(?!parts\.|success|overlong|truncated_value)", f"{where}.", message)


def _reward_in(names: Sequence[str]) -> str:
    """The reward that a key belongs to, e.g. `reward.parts.form` for `reward.parts.form.weight`."""
    if "reward" not in names:
        return "reward"
    first = names.index("reward")
    of_part = first + 2 < len(names) and names[first + 1] == "parts"
    return ".".join(names[: first + (3 if of_part else 1)])


def _quoted(value: Any) -> str:
    return f'"{str(value).lower() if isinstance(value, bool) else value}"'


_SHAPES = {"model_type": "a table", "model_attributes_type": "a table", "dict_type": "a table", "tuple_type": "a list"}
"""TOML's names for pydantic's shapes."""


def _strip_tags(location: Sequence[str], root: type[BaseModel]) -> list[str]:
    names: list[str] = []
    model: Any = root
    for part in location:
        if (entry := entries_of(model)) is not None:  # the part is a free name, or a number in a list
            names.append(part)
            model = entry
            continue
        members = tables_of(model)
        tags = {m.model_fields["type"].default for m in members if "type" in m.model_fields} if len(members) > 1 else set()
        if part in tags:
            model = next(m for m in members if m.model_fields["type"].default == part)
            continue
        names.append(part)
        model = next((_field(m, part) for m in members if _field(m, part) is not None), None)
    return names


def fields_at(location: Sequence[str], root: type[BaseModel]) -> list[str]:
    model: Any = root
    for part in location:
        if (entry := entries_of(model)) is not None:
            model = entry
            continue
        members = tables_of(model)
        tagged = [m for m in members if "type" in m.model_fields and m.model_fields["type"].default == part]
        if len(members) > 1 and tagged:
            model = tagged[0]
            continue
        model = next((_field(m, part) for m in members if _field(m, part) is not None), None)
    return [info.alias or name for m in tables_of(model) for name, info in m.model_fields.items()]


def _field(model: type[BaseModel], name: str) -> Any:
    for field, info in model.model_fields.items():
        if name in (field, info.alias):
            return info.annotation
    return None
