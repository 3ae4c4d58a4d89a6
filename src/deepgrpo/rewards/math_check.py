"""What the worker process does: one comparison by math-verify.

math-verify's own time limits are off. They rest on SIGALRM, which sympy's C code ignores, so the parent process
keeps the time and kills the worker.
"""

from __future__ import annotations

import contextlib
import logging
import re
from functools import lru_cache
from typing import Any

_MEMORY_LIMIT = 4 << 30  # bytes; 9**9**9 would otherwise ask for all there is before its time is up
_DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")


def warm_up() -> None:
    """Initializer of a worker: import what is slow to import, as a check's time limit must not pay for it."""
    # the libraries warn once per process that their own limits are off, which is what we want
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on this system
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = _MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(_MEMORY_LIMIT, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
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


def guarded(check: Any, text: str, references: tuple[str, ...]) -> tuple[bool, bool] | str:
    """Run a check; what it raises comes back as a text, as not every exception survives the way between processes."""
    try:
        correct, found = check(text, references)
        return bool(correct), bool(found)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"[:200]


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
