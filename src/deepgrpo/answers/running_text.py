"""Numbers in running text: the first or the last one, with its sign."""

from __future__ import annotations

import re
from collections.abc import Iterator

from deepgrpo.answers.numbers import FRACTION, PLAIN, POWER, read_number
from deepgrpo.answers.units import MULTIPLIERS

_WIDE_DIGITS = {chr(code): chr(code - 0xFEE0) for code in range(0xFF10, 0xFF1A)}
_ONE_FOR_ONE = str.maketrans({**dict.fromkeys("−–‑‒﹣－", "-"), **dict.fromkeys("\u00a0\u202f", " "), **_WIDE_DIGITS})
_SIGN_BEFORE = re.compile(
    r"(?:^|(?P<word>[A-Za-z]+)|(?P<mark>.))(?P<space>\s*)(?P<sign>[-+]|minus|negative)(?P<gap>\s*)$", re.DOTALL
)
_READ_AS_SIGN_AFTER = re.compile(
    r"is|are|was|be|equals?|gives?|gets?|yields|becomes?|to|answer|value|about|approximately", re.IGNORECASE
)


def _unnamed(pattern: str) -> str:
    return re.sub(r"[?]P<[a-z0-9_]+>", "?:", pattern)


# a token in running text: not inside a word, a longer number or an identifier
_TOKEN = re.compile(
    rf"(?<![A-Za-z0-9.])(?<!\d,)(?:(?:\d+\s*)?{_unnamed(FRACTION)}"
    rf"|\d+ \d+/\d+(?![\d/])"
    rf"|{PLAIN}(?:{_unnamed(POWER)}|\s?/\s?\d+(?:\.\d+)?(?![\d/]))?)"
    r"(?:\s*(?:\\?%|per\s?cent\b))?"
    rf"(?:\s+(?:{'|'.join(MULTIPLIERS)})\b)?"
)  # fmt: skip


def first_number(text: str) -> tuple[int, int] | None:
    """Start and end of the first number in running text, or None. See `_sign_before` for signs."""
    text = _one_for_one(text)
    return _first(text, _TOKEN.finditer(text))


def last_number(text: str) -> tuple[int, int] | None:
    """Start and end of the last number in running text, or None."""
    text = _one_for_one(text)
    # all tokens are found first, and read from the end: reading each would be slow on a page of digits
    return _first(text, reversed(list(_TOKEN.finditer(text))))


def _first(text: str, tokens: Iterator[re.Match[str]]) -> tuple[int, int] | None:
    for match in tokens:
        sign, start = _sign_before(text, match.start())
        if read_number(sign + match.group()) is not None:
            return start, match.end()
    return None


def _one_for_one(text: str) -> str:
    """Signs and digits of running text as ASCII, one character for one."""
    return text if text.isascii() else text.translate(_ONE_FOR_ONE)


def _sign_before(text: str, start: int) -> tuple[str, int]:
    """Sign of the number at `start` and where the signed number starts.

    A minus directly before a number is its sign unless it follows a letter, a digit or a bracket; one with a space after
    it is a sign at the start of the text, after a sign such as "=", and after words such as "is".
    """
    before = text[max(0, start - 40) : start]
    money = re.search(r"\\?[$€£]\s*$", before)
    if money is not None:
        before = before[: money.start()]
    match = _SIGN_BEFORE.search(before)
    if match is None:
        return "", start
    sign, gap, space = match["sign"], match["gap"], match["space"]
    word, mark = match["word"], match["mark"]
    at_start = not word and not mark and len(before) == start - (0 if money is None else len(money.group()))
    spaced = bool(gap) or sign in ("minus", "negative")
    if spaced and sign != "negative":
        opens = at_start or (mark is not None and mark in "=:([{,≈") or _READ_AS_SIGN_AFTER.fullmatch(word or "") is not None
    else:
        # directly before the digits: it subtracts only right behind an operand
        opens = bool(space) or (not word and (mark is None or not (mark.isalnum() or mark in ")]}%")))
    if not opens or (sign == "minus" and not gap):
        return "", start
    return ("" if sign == "+" else "-"), start - len(text[max(0, start - 40) : start]) + match.start("sign")
