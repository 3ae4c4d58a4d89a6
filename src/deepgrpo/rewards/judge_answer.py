"""The score in a judge's answer, mapped to 0..1.

number   the last number; of "8/10" and "8 out of 10", the 8
regex    the group of the pattern's last match
json     a key of the last JSON object that has it
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from deepgrpo.config import JudgeKeys

_NUMBER = r"(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?!\w|\.\d)"
_GRADE = re.compile(rf"({_NUMBER})(?:\s*(?:/|out of|of)\s*{_NUMBER})?")
_LONGEST = 100_000  # characters that are read; a judge that says more has gone astray


def read_score(answer: str, config: JudgeKeys) -> float | None:
    """The score on the scale from 0 (worst) to 1 (best); None if there is none, or none on the scale.

    Example with read = "number" and scale = [0, 10]: "I give it 8/10." is 0.8.
    """
    found = _find(answer[-_LONGEST:], config)
    number = _number(found, config.words)
    if number is None:
        return None
    worst, best = config.scale
    share = (number - worst) / (best - worst)
    return share if 0.0 <= share <= 1.0 else None


def _find(answer: str, config: JudgeKeys) -> Any:
    if config.read == "json":
        return _from_json(answer, config.key)
    matches = (_GRADE if config.pattern is None else re.compile(config.pattern)).findall(answer)
    return matches[-1] if matches else None


def _number(found: Any, words: dict[str, float]) -> float | None:
    if isinstance(found, str):
        lowered = {word.strip().lower(): number for word, number in words.items()}
        found = lowered.get(found.strip().lower(), found)
    elif isinstance(found, bool):
        found = words.get(str(found).lower(), found)
    try:
        number = float(found)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _from_json(answer: str, key: str) -> Any:
    """The value of a key in the last JSON object of a text that has it."""
    decoder, found, at = json.JSONDecoder(), None, 0
    while (at := answer.find("{", at)) >= 0:
        try:
            value, end = decoder.raw_decode(answer, at)
        except ValueError:
            at += 1
            continue
        except RecursionError:  # and so for each of the objects inside
            break
        inner = value
        for part in [key] if key in value else key.split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        found, at = (found if inner is None else inner), end
    return found
