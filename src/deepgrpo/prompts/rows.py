"""Rows of a data file: question, answer and id from the columns; reasons to skip a row.

A skipped row is counted under its reason. A missing column or a repeated id is an error that names the line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from deepgrpo.answers.numbers import decimal_form, drop_separators
from deepgrpo.config import ColumnMap
from deepgrpo.errors import DataError

EMPTY_QUESTION = "empty question"
BAD_ENCODING = "bad encoding"
TOO_LONG = "too long"
NO_ANSWER = "no answer"


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """One question before rendering.

    Example: QuestionRow(id="gsm8k-7", question="Natalia ...", answer="72", columns={"question": ..., "solution": ...}).
    """

    id: str
    question: str
    answer: str | list[str] | None = None
    """Reference answer; a list for several accepted strings."""
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RawRow:
    """Unprocessed row of a file. `values` is None if its bytes are not UTF-8."""

    number: int
    """Line of a JSONL file, or row of another file, counted from 1."""
    values: Mapping[str, Any] | None


def pick(raw_rows: Iterable[RawRow], columns: ColumnMap, source: str, unit: str, skipped: Counter[str]) -> list[QuestionRow]:
    """Select id, question and answer of raw rows.

    Rows without an answer (null, [], or blank) are skipped, unless `columns.answer` is None.

    Args:
        raw_rows: the rows of one file, in order.
        columns: names of the columns.
        source: the file's name, for messages.
        unit: unit of the row numbers ("line", "row"), for messages.
        skipped: count per reason of skipped rows; incremented in place.

    Raises DataError: a column is missing, a value has an unusable type, an id is repeated, the file has no row.
    """
    rows: list[QuestionRow] = []
    seen: dict[str, int] = {}
    count = 0
    for raw in raw_rows:
        count += 1
        if raw.values is None:
            skipped[BAD_ENCODING] += 1
            continue
        where = f"{source}, {unit} {raw.number}"
        question = _question(_column(raw.values, columns.question, "question", where), where)
        answer = columns.answer and _after(
            _answer(_column(raw.values, columns.answer, "answer", where), columns.answer, where), columns.answer_after
        )
        if not question.strip():
            skipped[EMPTY_QUESTION] += 1
            continue
        if not encodable(question):
            skipped[BAD_ENCODING] += 1
            continue
        if columns.answer is not None and not _says_something(answer):
            skipped[NO_ANSWER] += 1
            continue
        given = raw.values.get(columns.id) if columns.id else None
        name = str(raw.number) if given is None else str(given)
        if name in seen:
            raise DataError(
                f"{source}: id {name!r} is in {unit} {seen[name]} and in {unit} {raw.number}; make ids unique, or "
                'set data.columns.id = "none" to number the rows'
            )
        seen[name] = raw.number
        rows.append(QuestionRow(name, question, answer, raw.values))
    if count == 0:
        raise DataError(f"{source} is empty; it needs at least one row with a column {columns.question!r}")
    return rows


def _says_something(answer: str | list[str] | None) -> bool:
    return any(text.strip() for text in ([answer] if isinstance(answer, str) else answer or []))


def _after(answer: str | list[str] | None, marker: str | None) -> str | list[str] | None:
    """Text after the last marker, one number without its separators; an answer without the marker is unchanged."""
    if answer is None or marker is None:
        return answer
    if isinstance(answer, list):
        return [_after_last(each, marker) for each in answer]
    return _after_last(answer, marker)


def _after_last(text: str, marker: str) -> str:
    _, found, rest = text.rpartition(marker)
    return drop_separators(rest.strip()) if found else text


def encodable(text: str) -> bool:
    """False for half a surrogate pair, which JSON escapes may contain and no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _column(values: Mapping[str, Any], name: str, role: str, where: str) -> Any:
    try:
        return values[name]
    except KeyError:
        also = ', or "none" if the reward needs no answer' if role == "answer" else ""
        raise DataError(
            f"{where} has no column {name!r} (the {role}); its columns are {', '.join(map(str, values)) or '(none)'}; "
            f"set data.columns.{role} to one of them{also}"
        ) from None


def _question(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | Decimal):
        return _number(value)
    raise DataError(
        f"{where}: the question is a {type(value).__name__} ({str(value)[:60]!r}), not a text; "
        "set data.columns.question to a column of texts"
    )


def _answer(value: Any, column: str, where: str) -> str | list[str] | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float | Decimal):
        return _number(value)
    if isinstance(value, list | tuple) and all(isinstance(item, str | int | float | Decimal) for item in value):
        return [item if isinstance(item, str) else _number(item) for item in value] or None
    raise DataError(
        f"{where}: the answer in column {column!r} is a {type(value).__name__} ({str(value)[:60]!r}); "
        "it should be a text, a number or a list of accepted texts"
    )


def _number(value: int | float | Decimal) -> str:
    # many files write the integer 142 as 142.0; and 0.00001 must not become 1e-05
    return str(value) if isinstance(value, int) else decimal_form(value)
