"""Comparison of two answers by their form; formulas are left to a function that knows algebra."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from deepgrpo.answers.numbers import same_number
from deepgrpo.rewards.form import Form, compact, read_form
from deepgrpo.rewards.words import is_word, same_moment
from deepgrpo.rewards.workers import NotComparableError

Algebra = Callable[[Form, Form], bool]
"""Equality of a reference and an answer of which at least one is a formula, an equation or an inequality."""

_MOST_ITEMS = 64  # of an unordered list: every pair may need algebra
_ALGEBRAIC = ("formula", "number", "equation", "relation")

read = lru_cache(maxsize=4096)(read_form)  # the rollouts of one prompt share its reference


def quick_verdict(answer: str, references: tuple[str, ...]) -> bool | None:
    """The verdict on an answer if it needs no algebra: all are numbers, or the text is that of a reference."""
    form = read(answer)
    forms = [read(reference) for reference in references]
    if any(form.text == each.text and form.kind == each.kind and not _names_clash(form, each) for each in forms):
        return bool(form.text)
    if form.number is None or any(each.number is None for each in forms):
        return None
    return any(same_form(each, form, _no_algebra) for each in forms)


def is_numeric(references: tuple[str, ...]) -> bool:
    """True if a reference is a number, or if there is none."""
    return not references or any(read(reference).number is not None for reference in references)


def same_form(reference: Form, answer: Form, algebra: Algebra) -> bool:
    """True if an answer equals a reference.

    Raises NotComparableError: an enumeration with dots, or an inequality of several names against an interval.
    """
    if _names_clash(reference, answer):
        # MR = MC is MC = MR
        return (reference.name, answer.name) == (compact(answer.text).lower(), compact(reference.text).lower())
    if reference.number is not None and answer.number is not None:
        return same_number(reference.number, answer.number)
    kinds = {reference.kind, answer.kind}
    if "dots" in kinds:
        if compact(reference.text) == compact(answer.text):
            return True
        raise NotComparableError
    if kinds & {"words", "choice"}:
        return _same_words(reference, answer)
    if "based" in kinds:
        one, two = (form.number.text if form.number else form.text for form in (reference, answer))
        return one == two or (len(kinds) == 2 and one.partition("_")[0] == two.partition("_")[0])
    if reference.items or answer.items:
        return _same_items(reference, answer, algebra)
    if "number" not in kinds and compact(reference.text) == compact(answer.text):
        return True
    if ("equation" in kinds or "relation" in kinds) and len(kinds) > 1:
        return False
    return kinds <= set(_ALGEBRAIC) and algebra(reference, answer)


def _names_clash(first: Form, second: Form) -> bool:
    """True for "x = 5" and "y = 5". A word is no variable: "Total = 5" may answer "x = 5"."""
    names = {form.name for form in (first, second) if form.name and not is_word(form.name.replace(" ", ""))}
    return len(names) == 2


def _same_words(reference: Form, answer: Form) -> bool:
    first, second = _letters(reference), _letters(answer)
    if "choice" in (reference.kind, answer.kind):
        return first.upper() == second.upper()
    return first == second or same_moment(first, second)


def _letters(form: Form) -> str:
    return form.text if form.kind in ("words", "choice") else compact(form.text).strip("()").lower()


def _same_items(reference: Form, answer: Form, algebra: Algebra) -> bool:
    kinds = (reference.kind, answer.kind)
    if "relation" in kinds:
        raise NotComparableError
    first, second = reference.items, answer.items
    if not first or not second:
        # {5} and 5; nothing else equals a single value
        only, other = (first, answer) if first else (second, reference)
        if len(only) != 1 or "set" not in kinds:
            return False
        return same_form(only[0], other, algebra) if first else same_form(other, only[0], algebra)
    if len(first) != len(second) and "matrix" not in kinds:
        return False
    if "matrix" in kinds or "row" in kinds:
        return _same_matrix(reference, answer, algebra)
    unordered = {"list", "set", "union"}
    if kinds[0] in unordered and kinds[1] in unordered:
        return _same_unordered(first, second, algebra)
    if "set" in kinds or "union" in kinds:
        return False
    # "(1, 2)" may be a point or an interval; of more than two parts the kind of bracket says nothing
    if reference.bracketed and answer.bracketed and kinds[0] != kinds[1] and len(first) == 2:
        return False
    return all(same_form(one, two, algebra) for one, two in zip(first, second, strict=True))


def _same_matrix(reference: Form, answer: Form, algebra: Algebra) -> bool:
    """Matrices of one shape; a vector may be written as a tuple."""
    one, two = _rows(reference), _rows(answer)
    if one is None or two is None:
        flat = [_vector(rows) if rows is not None else list(form.items) for rows, form in ((one, reference), (two, answer))]
        if flat[0] is None or flat[1] is None or len(flat[0]) != len(flat[1]):
            return False
        return all(same_form(a, b, algebra) for a, b in zip(flat[0], flat[1], strict=True))
    return [len(row) for row in one] == [len(row) for row in two] and all(
        same_form(a, b, algebra) for left, right in zip(one, two, strict=True) for a, b in zip(left, right, strict=True)
    )


def _rows(form: Form) -> list[tuple[Form, ...]] | None:
    return [row.items for row in form.items] if form.kind == "matrix" else None


def _vector(rows: list[tuple[Form, ...]]) -> list[Form] | None:
    if len(rows) == 1:
        return list(rows[0])
    return [row[0] for row in rows] if all(len(row) == 1 for row in rows) else None


def _same_unordered(first: tuple[Form, ...], second: tuple[Form, ...], algebra: Algebra) -> bool:
    if len(first) > _MOST_ITEMS:
        raise NotComparableError
    left = list(second)
    # texts that agree are paired first: most need no algebra
    rest = []
    for one in first:
        twin = next((two for two in left if compact(one.text) == compact(two.text) and not _names_clash(one, two)), None)
        if twin is None:
            rest.append(one)
        else:
            left.remove(twin)
    for one in rest:
        twin = next((two for two in left if same_form(one, two, algebra)), None)
        if twin is None:
            return False
        left.remove(twin)
    return True


def _no_algebra(reference: Form, answer: Form) -> bool:
    return False
