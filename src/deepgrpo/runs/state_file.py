"""The state file of a checkpoint: JSON that carries the checksums of the other files and one of itself.

    {"step": 10, ..., "files": {"model/model.safetensors": {...}, ...}, "format": 2, "crc32": "0a1b2c3d"}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepgrpo.runs.checksums import Checksums, crc_of, is_checksums

FORMAT = 2
"""Version of the layout; a checkpoint of another one is refused."""

_OWN = ("files", "format", "crc32")
_LARGEST = 2**53
"""Counts up to this one are exact in any reader of JSON."""


def sealed(values: Mapping[str, Any], files: Checksums) -> str:
    """A table as the text of a state file."""
    whole = json.loads(json.dumps({**values, "files": files, "format": FORMAT}))  # as it will be read: keys become text
    return json.dumps({**whole, "crc32": _crc(whole)}, indent=1)


def read_sealed(path: Path) -> tuple[dict[str, Any], Checksums]:
    """The table and the checksums of a state file.

    Raises OSError if it cannot be read, ValueError if it is no JSON, is of another version, or has changed.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is no text") from None
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is no JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path.name} holds {type(raw).__name__}, not a table")
    if raw.get("format") != FORMAT:
        raise ValueError(f"{path.name} has format {raw.get('format')!r}, and this version reads {FORMAT}")
    if not is_checksums(raw.get("files")):
        raise ValueError(f"{path.name} has no checksums under 'files'")
    if (said := raw.pop("crc32", None)) != (found := _crc(raw)):
        raise ValueError(f"{path.name} has changed since it was written (CRC-32 {found} for {said})")
    files: Checksums = raw["files"]
    return {key: value for key, value in raw.items() if key not in _OWN}, files


def _crc(whole: Mapping[str, Any]) -> str:
    try:
        return crc_of(json.dumps(whole, sort_keys=True).encode())
    except RecursionError:
        raise ValueError("the state is nested too deeply") from None


# ---------------------------------------------------------------- checks


def check_keys(raw: Mapping[str, Any], names: Sequence[str], prefix: str = "") -> None:
    """Raise ValueError if a key is missing or unknown."""
    for problem, keys in (("missing", set(names) - set(raw)), ("unknown", set(raw) - set(names))):
        if keys:
            raise ValueError(f"the field {prefix}{min(keys)} is {problem}")


def check_table(value: Any, name: str) -> None:
    """Raise ValueError if a value is no table."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {_shown(value)}; it should be a table")


def check_count(value: Any, name: str) -> None:
    """Raise ValueError if a value is no whole number from 0 on."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
        raise ValueError(f"{name} is {_shown(value)}; it should be a whole number, 0 or more")


def check_number(value: Any, name: str, *, lowest: float | None = 0.0) -> None:
    """Raise ValueError if a value is no finite number, or lies below the lowest one."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if not number or not math.isfinite(value) or (lowest is not None and value < lowest):
        raise ValueError(f"{name} is {_shown(value)}; it should be a finite number{'' if lowest is None else ', 0 or more'}")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''}"
