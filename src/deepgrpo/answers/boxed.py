r"""Extraction of the last \boxed{...}, shared by rewards, tasks and the votes of maj@k."""

from __future__ import annotations

import re

# a box; a backslash that doubles that of a box; an escaped brace or a line break; a brace
_TOKEN = re.compile(
    r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?P<opened>\{)?|\\(?=\\(?:boxed|fbox)(?![A-Za-z]))|\\[\\{}]|(?P<brace>[{}])"
)
_UNBRACED = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?|\\(?!boxed|fbox)[A-Za-z]+(?:\{[^{}]*\})*|[A-Za-z](?![A-Za-z])")


def last_boxed(text: str) -> str | None:
    r"""Content of the last box that closes, or None; see `find_box`.

    >>> last_boxed("\\boxed{1} or \\boxed{\\frac{1}{2}}, not \\boxed{3")
    '\\frac{1}{2}'
    """
    found = find_box(text)
    return None if found is None else found[1]


def find_box(text: str) -> tuple[int, str] | None:
    r"""Start and content of the last box that closes, or None. An empty box counts only if all are empty.

    A box is \boxed{...} or \fbox{...}, with or without a space before the brace, or \boxed before a bare number or
    letter. Boxes are ordered by their start, so of two nested boxes the inner one is the last. A truncated box is skipped in
    favour of the one before it. An escaped brace is plain text; the second backslash of a line break
    `\\` escapes nothing.
    """
    stack: list[tuple[int, int] | None] = []
    best: tuple[int, str] | None = None
    # one pass with a stack: thousands of unclosed boxes must not take quadratic time
    for token in _TOKEN.finditer(text):
        if token["opened"]:
            stack.append((token.start(), token.end()))
        elif token["brace"] == "{":
            stack.append(None)
        elif token["brace"] == "}":
            opened = stack.pop() if stack else None
            if opened is not None:
                best = _later(best, opened[0], text[opened[1] : token.start()])
        elif len(token.group()) > 2 and (bare := _UNBRACED.match(text, token.end())) is not None:
            best = _later(best, token.start(), bare.group())
    return best


def _later(best: tuple[int, str] | None, start: int, content: str) -> tuple[int, str]:
    """The later of two boxes; an empty one is none where there is another."""
    if best is None or (bool(content.strip()), start) > (bool(best[1].strip()), best[0]):
        return start, content
    return best
