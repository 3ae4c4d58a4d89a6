"""Rows of a data file: question, answer and id from the columns; reasons to skip a row.

A skipped row is counted under its reason. A missing column or a repeated id is an error that names the line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepgrpo.answers.numbers import drop_separators
from deepgrpo.config import ColumnMap
from deepgrpo.errors import DataError
from deepgrpo.prompts.messages import Message, UnusableMessagesError, are_messages, last_user, read_messages, text_of
from deepgrpo.prompts.paths import MISSING, listed, nearest, paths_of, value_at
from deepgrpo.prompts.values import UnusableValueError, as_text, as_texts, encodable

EMPTY_QUESTION = "empty question"
BAD_ENCODING = "bad encoding"
TOO_LONG = "too long"
NO_ANSWER = "no answer"
NO_VALUE = "no value for the template"


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """One question before rendering.

    Example: QuestionRow(id="gsm8k-7", question="Natalia ...", answer="72", columns={"question": ..., "solution": ...}).
    """

    id: str
    question: str
    answer: str | list[str] | None = None
    """Reference answer; a list for several accepted texts."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    """The prompt as messages, where the row has it so; `question` is then the text of the last user turn."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """Unprocessed row of a file. `values` is None if its bytes are not UTF-8."""

    number: int
    """Line of a JSONL file, or row of another file, counted from 1."""
    values: Mapping[str, Any] | None
    name: str | None = None
    """Id of a row that has none of its own; default: the number."""
    place: str | None = None
    """Location for messages; default: name of the source, unit and number."""


def pick(
    raw_rows: Iterable[RawRow], columns: ColumnMap, source: str, unit: str, skipped: Counter[str]
) -> list[QuestionRow]:
    """Select id, question and answer of raw rows.

    Rows without an answer (null, NaN, [], or blank) are skipped, unless `columns.answer` is None. The answers are those of
    `columns.answer`, then those of `columns.alternatives`.

    Args:
        raw_rows: the rows, in order.
        columns: names of the columns.
        source: the file's name, for messages.
        unit: unit of the row numbers ("line", "row"), for messages.
        skipped: count per reason of skipped rows; incremented in place.

    Raises DataError: a column is missing, a value has an unusable type, an id is repeated, the file has no row.
    """
    rows: list[QuestionRow] = []
    seen: dict[str, str] = {}
    count = 0
    for raw in raw_rows:
        count += 1
        row = pick_one(raw, columns, source, unit, skipped)
        if row is None:
            continue
        place = raw.place or f"{unit} {raw.number}"
        if row.id in seen:
            raise DataError(
                f"{source}: id {row.id!r} is in {seen[row.id]} and in {place}; make ids unique, or "
                'set data.columns.id = "none" to number the rows'
            )
        seen[row.id] = place
        rows.append(row)
    if count == 0:
        raise DataError(f"{source} is empty; it needs at least one row with a column {columns.question!r}")
    return rows


def pick_one(raw: RawRow, columns: ColumnMap, source: str, unit: str, skipped: Counter[str]) -> QuestionRow | None:
    """Select id, question and answer of a row; None if it is skipped. See `pick`."""
    where = raw.place or f"{source}, {unit} {raw.number}"
    if raw.values is None or not encodable(raw.values, where):
        skipped[BAD_ENCODING] += 1
        return None
    question, messages = _question(raw.values, columns, where)
    answer = None if columns.answer is None else _answers(raw.values, columns, where)
    if not question.strip():
        skipped[EMPTY_QUESTION] += 1
        return None
    if columns.answer is not None and not answer:
        skipped[NO_ANSWER] += 1
        return None
    return QuestionRow(_id(raw, columns.id, where), question, answer, raw.values, messages)


def _after_last(text: str, marker: str) -> str:
    _, found, rest = text.rpartition(marker)
    return drop_separators(rest.strip()) if found else text


def _column(values: Mapping[str, Any], name: str, role: str, where: str) -> Any:
    value = value_at(values, name)
    if value is not MISSING:
        return value
    known = list(paths_of(values))
    close = nearest(name, known)
    if role == "question":  # a row with its prompt in messages has its question there
        close = next((column for column in values if are_messages(values[column])), close)
    also = ', or "none" if the reward needs no answer' if role == "answer" else ""
    raise DataError(
        f"{where} has no column {name!r} (the {role}); {f'did you mean {close!r}? Its' if close else 'its'} columns are "
        f"{listed(known)}; set data.columns.{role} to one of them{also}"
    )


def _question(values: Mapping[str, Any], columns: ColumnMap, where: str) -> tuple[str, tuple[Message, ...]]:
    """The question of a row and, if it is given by messages, these."""
    value = _column(values, columns.question, "question", where)
    if are_messages(value):
        try:
            messages = read_messages(value, columns.last_assistant)
        except UnusableMessagesError as error:
            raise DataError(f"{where}, column {columns.question!r}: {error}") from None
        return text_of(messages[last_user(messages)]), messages
    try:
        return as_text(value) or "", ()
    except UnusableValueError:
        if isinstance(value, list | tuple | np.ndarray) and not len(value):
            return "", ()
        raise DataError(
            f"{where}: the question is a {_kind(value)}, not a text; set data.columns.question to a column of texts or messages"
        ) from None


def _answers(values: Mapping[str, Any], columns: ColumnMap, where: str) -> str | list[str] | None:
    """Answers of a row: a text if the answer column holds one and there are no alternatives; None without an answer."""
    assert columns.answer is not None
    given = _column(values, columns.answer, "answer", where)
    found = _texts(given, columns.answer, where)
    if columns.answer_after is not None:
        found = [text for text in (_after_last(each, columns.answer_after) for each in found) if text.strip()]
    if not found:
        return None
    several = isinstance(given, list | tuple | np.ndarray)
    if columns.alternatives is not None and (others := _others(values, columns.alternatives, where)):
        found, several = list(dict.fromkeys([*found, *others])), True
    return found if several else found[0]


def _others(values: Mapping[str, Any], column: str, where: str) -> list[str]:
    """Further accepted answers; none where the row does not have the column."""
    found = value_at(values, column)
    return [] if found is MISSING else _texts(found, column, where)


def _texts(value: Any, column: str, where: str) -> list[str]:
    try:
        return as_texts(value)
    except UnusableValueError:
        raise DataError(
            f"{where}: the answer in column {column!r} is a {_kind(value)}; it should be a text, a number or a list of "
            "accepted texts"
        ) from None


def _id(raw: RawRow, column: str | None, where: str) -> str:
    """The id of a row; without one, its number."""
    assert raw.values is not None
    found = value_at(raw.values, column) if column else None
    try:
        given = None if found is MISSING else as_text(found)
    except UnusableValueError:
        raise DataError(
            f"{where}: the id in column {column!r} is a {_kind(found)}, not a text or a number; set "
            'data.columns.id to another column, or to "none" to number the rows'
        ) from None
    return given if given is not None and given.strip() else raw.name or str(raw.number)


def _kind(value: Any) -> str:
    return f"{type(value).__name__} ({str(value)[:60]!r})"
