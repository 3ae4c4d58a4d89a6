"""The answer inside a response, as a short string: the ballot of maj@k.

Scoring never uses this: the reward reads the whole response with its own rules. A vote only has to decide which
responses agree with each other, and there equal strings after light tidying are enough: "1/2" and "0.5" count as
two answers here although a maths reward accepts either. That makes maj@k a lower bound where answers are not
plain numbers.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def extract_answer(text: str) -> str | None:
    r"""The normalised answer of a response, or None.

    The first of these that is there: the content of the last `\boxed{...}` (braces balanced), the rest of the line
    after the last `####`, the number after the last `#` (a heading such as `# Solution` is no answer), the last number.

    >>> extract_answer("so 3*4 = \\boxed{12}.")
    '12'
    >>> extract_answer("#### 1,200.")
    '1200'
    >>> extract_answer("I do not know") is None
    True
    """
    hash_number = _after(text, "#")
    if hash_number is not None and not _NUMBER.fullmatch(normalise(hash_number)):
        hash_number = None
    candidates = (_last_boxed(text), _after(text, "####"), hash_number, _last_number(text))
    return next((tidy for raw in candidates if raw is not None and (tidy := normalise(raw))), None)


def normalise(answer: str) -> str:
    """Strip white space, `$` signs and a final period; drop thousands separators and inner white space.

    >>> normalise(" $1,234$. ")
    '1234'
    """
    answer = answer.strip().removesuffix(".").strip().strip("$").strip().removesuffix(".")
    answer = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)
    return re.sub(r"\s+", "", answer)


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for index in range(begin, len(text)):
        # an escaped brace is a printed one: \{ and \} come in pairs of their own, so counting them does no harm
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin:index]
    return None  # never closed: the response was cut off inside it


def _after(text: str, marker: str) -> str | None:
    _, found, tail = text.rpartition(marker)
    return tail.lstrip(" ").split("\n", 1)[0] if found else None


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None
