"""JSON for files: readable, on one line, and without the halves of characters that no file takes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

_UNSAFE = re.compile("[\\x85\\u2028\\u2029\\ud800-\\udfff]")


def json_text(value: Any, **options: Any) -> str:
    r"""Readable JSON that any file takes, on one line by any reader's idea of a line (without `indent`).

    Half a surrogate pair, which UTF-8 cannot hold and strict readers refuse, becomes its escape as a text of six characters,
    \ud800. A tokenizer or a user's function may produce one.

    Args:
        options: further arguments of `json.dumps`.
    """
    return _UNSAFE.sub(_escaped, json.dumps(value, ensure_ascii=False, **options))


def plain_json(value: Any) -> Any:
    """A value as JSON can express it: names as text, NaN and infinities as null, unknown values as text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_json(each) for each in value]
    return str(value)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\\\u{code:04x}" if 0xD800 <= code < 0xE000 else f"\\u{code:04x}"
