"""What the worker process does: one comparison by math-verify.

math-verify's own time limits are off. They rest on SIGALRM, which sympy's C code ignores, so the parent process
keeps the time and kills the worker.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from deepgrpo.rewards.workers import limit_memory

_DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")


def warm_up() -> None:
    """Initializer of a worker: import what is slow to import, as a check's time limit must not pay for it."""
    # the libraries warn once per process that their own limits are off, which is what we want
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    limit_memory()
    check_answer("\\boxed{\\frac{1}{2}}", ("0.5",))


def check_answer(text: str, references: tuple[str, ...]) -> tuple[bool, bool]:
    r"""Compare the answer in a text with the accepted ones.

    Args:
        text: what math-verify's `parse` shall look at: a \boxed{...}, a line with a number, or a whole response.
        references: accepted answers; one that has no LaTeX delimiters is read as LaTeX, and as plain text if that
            gives no expression.

    Returns:
        (correct, found): whether any reference matches, and whether there was an answer in the text.

    >>> check_answer("\\boxed{25}", ("025",))
    (True, True)
    """
    from math_verify import verify

    answer = _parse(text)
    if not answer:
        return False, False
    return any(bool(verify(_gold(reference), answer, timeout_seconds=None)) for reference in references), True


@lru_cache(maxsize=4096)  # the rollouts of one prompt share its reference
def _gold(reference: str) -> list[Any]:
    reference = reference.strip()
    if _DELIMITER.search(reference):
        return _parse(reference)
    bare = reference.rstrip(".")
    # only a reading without any expression falls back: the plain reading of (3, \frac{\pi}{2}) would be the number 2
    parsed = _parse(f"${bare}$")
    return parsed if any(not isinstance(item, str) for item in parsed) else parsed + _parse(bare)


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    found: list[Any] = parse(text, parsing_timeout=None)
    return found
