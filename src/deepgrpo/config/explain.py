"""Text for `--help-config`: every key of a recipe with its type, default and docstring, read from the models."""

from __future__ import annotations

import json
import textwrap
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from deepgrpo.config.base import entries_of, tables_of
from deepgrpo.config.recipe import Config
from deepgrpo.errors import ConfigError, did_you_mean

Block = tuple[str, type[BaseModel], bool]
"""A section's name, the model of its keys, and True if the whole table is optional."""

_REPEATED = ("eval.data", "eval.reward", "data.sources.data")
"""Tables with the same keys as [data] and [reward], not repeated."""


def section_names() -> list[str]:
    """Top-level tables of a recipe, in the order of `Config`."""
    return list(Config.model_fields)


def describe_keys(section: str | None = None, width: int = 100) -> str:
    """Describe all keys of a recipe, or those of one section such as "explore" or "explore.segments".

    Raises ConfigError, with the nearest match, if there is no such section.
    """
    blocks = _blocks(Config, "")
    if section:
        known = list(dict.fromkeys(name for name, _, _ in blocks))
        blocks = [block for block in blocks if block[0] == section or block[0].startswith(section + ".")]
        if not blocks:
            raise ConfigError(f"recipes have no section {section!r}; {did_you_mean(section, known, 'sections')}")
    return "\n\n".join(_block(name, model, optional, width) for name, model, optional in blocks) + "\n"


def _blocks(model: type[BaseModel], prefix: str) -> list[Block]:
    """All tables below a model in key order; the kinds of one section are adjacent."""
    blocks: list[Block] = []
    for field, info in model.model_fields.items():
        name = prefix + (info.alias or field) + (".NAME" if entries_of(info.annotation) is not None else "")
        if name in _REPEATED:
            continue
        kinds = tables_of(info.annotation)
        blocks += [(name, kind, NoneType in get_args(info.annotation)) for kind in kinds]
        blocks += [block for kind in kinds for block in _blocks(kind, f"{name}.")]
    # kinds of one section share tables such as data.template: show each once
    return list(dict.fromkeys(blocks))


def _block(section: str, model: type[BaseModel], optional: bool, width: int) -> str:
    kind = _kind(model)
    title = f"[{section}]" + (f' with type = "{kind}"' if kind else "")
    lines = [title + ("  (optional table)" if optional else "")]
    lines += _indent(model.__doc__ or "", 2, width)
    for field, info in model.model_fields.items():
        key = f"{section}.{info.alias or field}"
        # the title has the kind, and nested tables have blocks of their own
        if (field == "type" and kind) or (tables_of(info.annotation) and key not in _REPEATED):
            continue
        lines.append(f"  {key} = {_default(info)}  ({_words(info.annotation, info.metadata)})")
        lines += _indent(info.description or "", 6, width)
    return "\n".join(lines)


def _kind(model: type[BaseModel]) -> str | None:
    """The one value of `type` in a tagged section; None where `type` is an ordinary choice or missing."""
    tag = model.model_fields.get("type")
    choices = get_args(tag.annotation) if tag else ()
    return str(choices[0]) if len(choices) == 1 else None


def _indent(text: str, columns: int, width: int) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), width, initial_indent=" " * columns, subsequent_indent=" " * columns,
        break_on_hyphens=False,
    )  # fmt: skip


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "…"
    return "none" if info.default is None else json.dumps(info.default, ensure_ascii=False)


def _words(annotation: Any, metadata: Any = ()) -> str:
    """A type in the words of TOML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if tables_of(annotation):
        return "a table" + (", or none" if NoneType in arguments else "")
    if origin is Annotated:
        return _words(arguments[0], arguments[1:])
    if origin is Literal:
        return " | ".join(json.dumps(value) for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join("none" if part is NoneType else _words(part) for part in arguments)
    if origin is tuple:
        inner = arguments[0] if len(arguments) == 2 and arguments[1] is Ellipsis else None
        return f"list of {_words(inner)}" if inner else f"[{', '.join(_words(part) for part in arguments)}]"
    if origin is dict:
        return "a table"
    name = {str: "string", bool: "true | false", int: "integer", float: "number"}.get(annotation, str(annotation))
    return " ".join([name, *_bounds(metadata)])


def _bounds(metadata: Any) -> list[str]:
    flat = [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return [f"{sign} {getattr(item, name)}" for item in flat for name, sign in signs.items() if hasattr(item, name)]
