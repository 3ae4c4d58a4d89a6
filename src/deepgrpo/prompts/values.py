"""Values of a row that count as a text: which are a question, an answer, an id, and which are missing.

    text, number                       used (a number in decimal form)
    null, NaN, infinite, NaT           missing, as if the cell were empty
    list of these                      several accepted answers; missing and blank ones are dropped
    true, date, bytes, table, ...      refused: their text form is not an answer

numpy's scalars and arrays count as what they hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from deepgrpo.answers.numbers import decimal_form
from deepgrpo.errors import DataError

MAX_DEPTH = 100
"""Deepest nesting of a row: saving a deeper one would exhaust Python's stack."""


class UnusableValueError(Exception):
    """A value that is neither a text nor missing."""


def is_missing(value: Any) -> bool:
    """True for null, NaN and pandas' NA and NaT. An infinite number is missing too: no answer equals it."""
    if isinstance(value, float | np.floating):
        return not math.isfinite(value)
    if isinstance(value, Decimal):
        return not value.is_finite()
    # by name, because pandas need not be installed
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def as_text(value: Any) -> str | None:
    """A text or a number as text; None for a missing value. Raises UnusableValueError for anything else."""
    if isinstance(value, np.generic):
        value = value.item()
    if is_missing(value):
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise UnusableValueError(type(value).__name__)
    return str(value) if isinstance(value, int) else decimal_form(value)


def as_texts(value: Any) -> list[str]:
    """The texts of a list, or of a single value, without missing, blank and repeated ones."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    found = [as_text(each) for each in (value if isinstance(value, list | tuple) else [value])]
    return list(dict.fromkeys(text for text in found if text is not None and text.strip()))


def encodable(row: Mapping[str, Any], where: str) -> bool:
    """False for a row with half a surrogate pair, which JSON escapes may contain and neither a tokenizer nor a file takes.

    Raises DataError if the row is nested too deeply to be saved.
    """
    try:
        text = json.dumps(row, ensure_ascii=False, default=str, skipkeys=True)
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth(row) > MAX_DEPTH:
            raise RecursionError
        text.encode()
    except UnicodeEncodeError:
        return False
    except RecursionError:
        raise DataError(f"{where} is nested more than {MAX_DEPTH} levels deep; write the nested part as a text") from None
    return True


def _depth(value: Any) -> int:
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        value, depth = waiting.pop()
        deepest = max(deepest, depth)
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        waiting += [(each, depth + 1) for each in inner]
    return deepest
