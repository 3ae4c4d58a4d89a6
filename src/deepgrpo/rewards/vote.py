"""Votes of maj@k: the answer of a response as a short normalised string.

Scoring never uses votes. A reward that knows which part of a response it reads votes with that part
(`rewards.base.Voting`); `loose_answer` is the fallback. Responses agree if their normalised strings are equal: "1/2"
and "0.5" are two answers here, although a maths reward accepts either. maj@k is therefore a lower bound where answers
are not plain numbers.
"""

from __future__ import annotations

import re

from deepgrpo.boxed import last_boxed

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def loose_answer(text: str) -> str | None:
    r"""Normalised answer of a response in free form, or None.

    The first that exists of: the content of the last `\boxed{...}` that closes; the rest of the line after the last
    `####`; the number after the last `#` (a heading such as `# Solution` is no answer); the last number.

    >>> loose_answer("so 3*4 = \\boxed{12}.")
    '12'
    >>> loose_answer("#### 1,200.")
    '1200'
    >>> loose_answer("I do not know") is None
    True
    """
    hash_number = _after(text, "#")
    if hash_number is not None and not _NUMBER.fullmatch(normalise(hash_number)):
        hash_number = None
    candidates = (last_boxed(text), _after(text, "####"), hash_number, _last_number(text))
    return next((tidy for raw in candidates if raw is not None and (tidy := normalise(raw))), None)


def normalise(answer: str) -> str:
    """Strip white space, `$` signs and a final period; remove thousands separators and inner white space.

    >>> normalise(" $1,234$. ")
    '1234'
    """
    answer = answer.strip().removesuffix(".").strip().strip("$").strip().removesuffix(".")
    answer = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)
    return re.sub(r"\s+", "", answer)


def _after(text: str, marker: str) -> str | None:
    _, found, tail = text.rpartition(marker)
    return tail.lstrip(" ").split("\n", 1)[0] if found else None


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None
