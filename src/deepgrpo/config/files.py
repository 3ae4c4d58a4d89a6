"""Recipes as TOML files: reading, overriding, writing."""

from __future__ import annotations

import codecs
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from deepgrpo.config.base import Section
from deepgrpo.config.problems import fields_at, parse_section
from deepgrpo.config.recipe import Config
from deepgrpo.config.shipped import find_recipe
from deepgrpo.config.values import key_kinds, read_value
from deepgrpo.errors import ConfigError


def load_recipe(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Read a TOML recipe and apply `--section.key value` overrides.

    Raises ConfigError: the file is missing or not TOML, a key is unknown, a value does not fit.
    """
    path = Path(path)
    raw = read_recipe(path)
    override(raw, overrides)
    return parse_config(raw, source=str(path))


def override(raw: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> None:
    """Apply `--section.key value` overrides to a nested dict, in place. Raises ConfigError for a key below a value."""
    # types first: the other keys belong to the new type
    for dotted, value in sorted(overrides, key=lambda item: not item[0].endswith(".type")):
        _set_dotted(raw, dotted, value)
        if dotted.endswith(".type"):
            _keep_known(raw, dotted.split(".")[:-1])


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe as a nested dict, unchecked.

    A top-level key `base` names another recipe (a shipped one, or a path relative to this file) that this one changes; see
    `merge`.

    Raises ConfigError: a file is missing or not TOML, or recipes are each other's base.
    """
    raw: dict[str, Any] = {}
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            raise ConfigError(f"recipe {str(path)!r} is its own base, by way of {[each.stem for each in seen]}; remove a base")
        seen.append(path.resolve())
        found = _read_toml(path)
        base = found.pop("base", None)
        raw = merge(found, raw)
        if base is None:
            return raw
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base is {base!r}; it should be the name or the path of a recipe")
        beside = path.parent / Path(base).expanduser()
        path = beside if beside.suffix == ".toml" else find_recipe(base)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"recipe {str(path)!r} does not exist; `deepgrpo recipes` lists the shipped ones") from None
    except IsADirectoryError:
        raise ConfigError(f"recipe {str(path)!r} is a directory; name a .toml file") from None
    except OSError as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read: {error}; name a .toml file that you may read") from None
    except ValueError as error:
        raise ConfigError(f"recipe {str(path)!r} is not valid TOML: {error}") from None


def parse_toml(content: bytes) -> dict[str, Any]:
    """Parse a TOML file as any editor may have saved it: with a byte order mark, or with lines that end in CR LF.

    Raises ValueError, with the cause as a clause, if it is not UTF-8 or not TOML.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise ValueError("it looks like UTF-16 or a binary file; save it as UTF-8")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = content[error.start]
        raise ValueError(f"line {line} has the byte 0x{byte:02x}, which is not UTF-8; save it as UTF-8") from None
    except RecursionError:
        raise ValueError("its lists are nested too deeply") from None


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Apply changes to a recipe: tables are merged key by key; a table of another `type` replaces the former one.

    >>> merge({"explore": {"type": "deep", "gamma": 2.0}}, {"explore": {"gamma": 1.0}})
    {'explore': {'type': 'deep', 'gamma': 1.0}}
    >>> merge({"explore": {"type": "deep", "gamma": 2.0}}, {"explore": {"type": "root"}})
    {'explore': {'type': 'root'}}
    """
    merged = dict(base)
    for key, value in changes.items():
        former = merged.get(key)
        if not isinstance(value, Mapping):
            merged[key] = value
        elif isinstance(former, Mapping) and value.get("type", former.get("type")) == former.get("type"):
            merged[key] = merge(former, value)
        else:
            merged[key] = merge({}, value)
    return merged


def _keep_known(raw: dict[str, Any], section: Sequence[str]) -> None:
    """After `--explore.type root`, drop keys of the recipe that the new type does not have."""
    table: Any = raw
    for name in section:
        table = table[int(name)] if isinstance(table, list) else table[name]
    known = fields_at([*section, str(table["type"])], Config)
    for key in [key for key in table if known and key not in known]:  # an unknown type is reported later
        del table[key]


def parse_config(raw: Mapping[str, Any], source: str = "the recipe") -> Config:
    """Validate a nested dict. Raises ConfigError that lists every problem, one per line."""
    return parse_section(Config, raw, source)


def to_toml(config: Config) -> str:
    """The resolved recipe as TOML; `load_recipe` reads it back to an equal config.

    Raises ConfigError for a None inside a free table (`data.params`, ...), which TOML cannot write.
    """
    return tomli_w.dumps(to_tables(config))


def to_tables(config: Config) -> dict[str, Any]:
    """The resolved recipe as tables; `parse_config` reads them back to an equal config, without the objects it holds."""
    return _dump(config)


def _dump(section: Section, prefix: str = "") -> dict[str, Any]:
    """A section as a dict for TOML: an absent value is left out, or "none" where absent is not the default."""
    table: dict[str, Any] = {}
    for name, info in type(section).model_fields.items():
        if name in section.unset:
            continue
        value, key = getattr(section, name), info.alias or name
        if isinstance(value, Section):
            table[key] = _dump(value, f"{prefix}{key}.")
        elif value is not None:
            table[key] = _writable(value, prefix + key)
        elif info.default is not None:
            table[key] = "none"
    return table


def _writable(value: Any, key: str) -> Any:
    if isinstance(value, Section):
        return _dump(value, f"{key}.")
    if value is None:
        raise ConfigError(f"{key} is none, which TOML cannot write; leave the key out or give it a value")
    if isinstance(value, dict):
        return {name: _writable(each, f"{key}.{name}") for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(each, key) for each in value]
    return value


def set_values(raw: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set keys of a recipe, as in {"optim.lr": 1e-5}; a new `type` drops the keys that it does not have.

    Raises ConfigError if a key leads through a value.
    """
    for dotted, value in sorted(values.items(), key=lambda item: not item[0].endswith(".type")):
        *sections, key = dotted.split(".")
        _table_at(raw, sections, dotted)[key] = value
        if key == "type" and sections:
            _keep_known(raw, sections)


def _table_at(raw: dict[str, Any], sections: Sequence[str], dotted: str) -> dict[str, Any]:
    table: Any = raw
    for section in sections:
        if isinstance(table, list) and section.isdecimal() and int(section) < len(table):
            table = table[int(section)]
        else:
            table = table.setdefault(section, {}) if isinstance(table, dict) else table
        if not isinstance(table, dict | list):
            raise ConfigError(f"--{dotted}: {section!r} is a value ({table!r}), not a section; use --{section} VALUE")
    if isinstance(table, list):
        raise ConfigError(
            f"--{dotted}: {sections[-1]!r} is a list of tables; write --{'.'.join(sections)}.0.KEY VALUE for the first"
        )
    return table  # type: ignore[no-any-return]


def _set_dotted(raw: dict[str, Any], dotted: str, value: str) -> None:
    *sections, key = dotted.split(".")
    _table_at(raw, sections, dotted)[key] = read_value(value, key_kinds(dotted.split("."), raw, Config))
