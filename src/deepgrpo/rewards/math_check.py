"""One comparison of answers, run in a worker process.

The parent process enforces the time limit and kills the worker: sympy's C code ignores signals.
"""

from __future__ import annotations

import logging

from deepgrpo.rewards.algebra import same_formula
from deepgrpo.rewards.same import read, same_form
from deepgrpo.rewards.workers import NotComparableError, limit_memory


def warm_up() -> None:
    """Initializer of a worker: run the slow imports, so that they do not count against a check's time limit."""
    # silence the libraries' warning that their own limits are off
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    limit_memory()
    check_answer("\\sqrt{\\frac{1}{4}}", ("0.5",))


def check_answer(text: str, references: tuple[str, ...]) -> tuple[bool, bool]:
    r"""Compare an answer with the accepted ones.

    Args:
        text: the bare answer, see `answers.places.find_answer`.
        references: accepted answers.

    Returns:
        (correct, found): some reference matches; the text is an answer and not mere prose beside numbers and formulas.

    Raises NotComparableError: no reference matches, and one could not be compared.

    >>> check_answer("25", ("025",))
    (True, True)
    """
    answer = read(text)
    forms = [read(reference) for reference in references]
    refused = False
    for form in forms:
        try:
            if same_form(form, answer, same_formula):
                return True, True
        except NotComparableError:
            refused = True
    if refused:
        raise NotComparableError
    return False, answer.kind != "words" or any(form.kind in ("words", "choice") for form in forms)
