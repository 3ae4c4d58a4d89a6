r"""Placeholders of a template: `{name}` stands for a column of the row, and the braces of LaTeX stand for themselves.

    Level {level}: {question} Answer in \boxed{}, e.g. \boxed{answer}. Write {{x}} for {x}.
          ^^^^^^^  ^^^^^^^^^^                      kept as it is              kept without the outer braces
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

QUESTION = "question"
"""Placeholder of the question, also as the argument of a command."""

_COMMAND = re.compile(r"\\[A-Za-z]{2,}\*?(?:\[[^\]\n]*\])?")  # of one letter it is \n or \t, which TOML may hand on unread
_KEPT = re.compile(r"\{\{([^{}\n]+)\}\}")
_NAME = re.compile(r"\{([^{}\n]+)\}")
_WORD = re.compile(r"(?!\d+$)\w{2,}(?:\.-?\w+)*(?:[!:]\S*)?")  # {level:d} is Python's, and no column: an error


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A name in braces. Example: Placeholder("metadata.level", "{metadata.level}", required=True)."""

    name: str
    """Column; a nested one by its path, e.g. prompt.-1.content."""
    text: str
    """As it stands in the template."""
    required: bool
    """False where the braces may mean themselves, as in x_{i}, {n-1} and {2}: they are kept if no row has the column."""


@lru_cache(maxsize=64)
def pieces(template: str) -> tuple[str | Placeholder, ...]:
    r"""Split a template into texts and placeholders.

    The arguments of a LaTeX command are text, except for braces inside them: `\frac{a}{b}` and `\boxed{answer}` have no
    placeholder, `\boxed{{answer}}` has one.

    >>> pieces(r"Solve {question} in \boxed{answer}.")
    ('Solve ', Placeholder(name='question', text='{question}', required=True), ' in \\boxed{answer}.')
    """
    found: list[str | Placeholder] = []
    text = ""
    opened: list[bool] = []  # per open brace: does it hold an argument?
    argument = script = False  # directly behind a command or its argument; behind _ or ^
    at = 0
    while at < len(template):
        if command := _COMMAND.match(template, at):
            text, at, argument, script = text + command.group(), command.end(), True, False
            continue
        here = template[at]
        if here == "{" and not argument and (kept := _KEPT.match(template, at)):
            text, at, script = text + "{" + kept.group(1) + "}", kept.end(), False
            continue
        if here == "{" and (name := _NAME.match(template, at)) and (not argument or name.group(1) == QUESTION):
            column = name.group(1).strip()
            required = _WORD.fullmatch(column) is not None and not script
            found += [text, Placeholder(column, name.group(), required)]
            text, at, argument, script = "", name.end(), False, False
            continue
        if here == "{":
            opened.append(argument)
            argument = False
        else:
            argument = here == "}" and bool(opened) and opened.pop()
        script = here in "_^"
        text, at = text + here, at + 1
    return tuple(piece for piece in [*found, text] if piece != "")


def placeholders(template: str | None) -> tuple[Placeholder, ...]:
    """The placeholders of a template, each once."""
    if template is None:
        return ()
    return tuple(dict.fromkeys(piece for piece in pieces(template) if isinstance(piece, Placeholder)))
