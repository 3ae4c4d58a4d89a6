"""One comparison by math-verify, run in a worker process.

math-verify's own time limits are off: they use SIGALRM, which sympy's C code ignores. The parent process enforces the
limit and kills the worker.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from deepgrpo.rewards.workers import limit_memory

_DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")


def warm_up() -> None:
    """Initializer of a worker: run the slow imports, so that they do not count against a check's time limit."""
    # silence the libraries' warning that their own limits are off
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    limit_memory()
    check_answer("\\boxed{\\frac{1}{2}}", ("0.5",))


def check_answer(text: str, references: tuple[str, ...]) -> tuple[bool, bool]:
    r"""Compare the answer in a text with the accepted ones.

    Args:
        text: input of math-verify's `parse`: a \boxed{...}, a line with a number, or a whole response.
        references: accepted answers. One without LaTeX delimiters is parsed as LaTeX, or as plain text if LaTeX gives
            no expression.

    Returns:
        (correct, found): some reference matches; the text has an answer.

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
    # fall back only if LaTeX gives no expression: as plain text, (3, \frac{\pi}{2}) would be the number 2
    parsed = _parse(f"${bare}$")
    return parsed if any(not isinstance(item, str) for item in parsed) else parsed + _parse(bare)


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    found: list[Any] = parse(text, parsing_timeout=None)
    return found
