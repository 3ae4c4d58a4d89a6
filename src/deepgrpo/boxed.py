r"""The last \boxed{...} of a text: one reading for the rewards, the tasks and the vote of maj@k."""

from __future__ import annotations

_MARKER = "\\boxed{"


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} whose braces close, else None.

    "Last" is by where the box begins: of nested boxes the inner one. A box that was cut off does not count, the one
    before it does. An escaped brace is a character and no bracket.

    >>> last_boxed("\\boxed{1} or \\boxed{\\frac{1}{2}}, not \\boxed{3")
    '\\frac{1}{2}'
    """
    stack: list[int | None] = []
    last: str | None = None
    last_start = -1
    index = 0
    # one pass with a stack: a response of thousands of unclosed boxes must not cost quadratic time
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
