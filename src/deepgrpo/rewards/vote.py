r"""Votes of maj@k: the answer of a response as a short normalised string.

Scoring never uses votes. A reward that knows which part of a response it reads votes with that part
(`rewards.base.Voting`); `loose_answer` is the fallback. Responses agree if their normalised strings are equal: numbers
are equal by value ("1/2", "0.5" and `\frac12`), units and "x =" do not matter. Formulas are compared as text, so maj@k is
a lower bound where answers are formulas.
"""

from __future__ import annotations

import re

from deepgrpo.answers.numbers import read_number
from deepgrpo.answers.places import MARKER, find_answer
from deepgrpo.rewards.form import canonical_form, read_form

_LONGEST = 200  # characters of a vote in free form


def loose_answer(text: str) -> str | None:
    r"""Normalised answer of a response in free form, or None.

    The answer behind the last mark (`####`, a box, "the answer is"); without one the number behind the last `#` (a
    heading such as `# Solution` is no answer); else the last number.

    >>> loose_answer("so 3*4 = \\boxed{12}.")
    '12'
    >>> loose_answer("#### 1,200.")
    '1200'
    >>> loose_answer("I do not know") is None
    True
    """
    if MARKER not in text:
        _, found, tail = text.rpartition("#")
        line = tail.lstrip(" ").split("\n", 1)[0]
        if found and read_number(line) is not None:
            return normalise(line)
    answer = find_answer(text, "any")
    if answer is None or (answer == text.strip() and not re.search(r"\d", answer)):
        return None
    return (normalise(answer) or None) if len(answer) <= _LONGEST else None


def normalise(answer: str) -> str:
    r"""Short text of an answer, equal for equal numbers, lists and words.

    >>> normalise(" $1,234$. "), normalise("x = \\frac12"), normalise("(1, 2)")
    ('1234', '0.5', '(1,2)')
    """
    return canonical_form(read_form(answer))
