r"""Extraction of the last \boxed{...}, shared by rewards, tasks and the votes of maj@k."""

from __future__ import annotations

_MARKER = "\\boxed{"


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} whose braces close, or None.

    Boxes are ordered by their start, so of two nested boxes the inner one is the last. A truncated box is skipped in
    favour of the one before it. An escaped brace is plain text.

    >>> last_boxed("\\boxed{1} or \\boxed{\\frac{1}{2}}, not \\boxed{3")
    '\\frac{1}{2}'
    """
    stack: list[int | None] = []
    last: str | None = None
    last_start = -1
    index = 0
    # one pass with a stack: thousands of unclosed boxes must not take quadratic time
    while index < len(text):
        if text.startswith(_MARKER, index):
            stack.append(index + len(_MARKER))
            index += len(_MARKER)
            continue
        if text.startswith(("\\{", "\\}"), index):
            index += 2
            continue
        if text[index] == "{":
            stack.append(None)
        elif text[index] == "}" and stack:
            start = stack.pop()
            if start is not None and start > last_start:
                last, last_start = text[start:index], start
        index += 1
    return last
