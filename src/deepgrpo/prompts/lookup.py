"""Questions of several hops as text: tables that only lookups show, written episodes, and the first error of an episode.

    table      f: 0→4, 1→9, 2→0, 3→7, …   g: …   h: …      drawn anew for each question, not part of the prompt
    question   3fgh:                                       what is h(g(f(3)))?
    episode    f3?7;g7?2;h2?5;#5                           a turn asks one lookup; the observation is its result and ';'
    recovered  f3?7;g8?4;h4?1;g7?2;h2?5;#5                 g8 is wrong, h4 carries it on; g7 and h2 put it right

A turn ends with '?'; the text behind the last observation is the answer. A lookup that is not of this form, or of a function
that the table lacks, is answered by '!;'. An episode is right if it has asked the lookups of all hops, in order, and its answer
is the last one's result: a guess is never right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from deepgrpo import rng
from deepgrpo.errors import DataError
from deepgrpo.records import Prompt

LETTERS = "fghijklmnopqrstuvwxyz"
"""Names of functions, in order."""
VALUES = 10
ASK, END, MALFORMED, ANSWER = "?", ";", "!", "#"

Table = Mapping[str, str]
"""Function → its values at 0 to 9. Example: {"f": "4907381265", "g": ...}."""

TABLE = "table"
"""Column of a row with its table."""

_QUESTION = re.compile(r"([0-9])([f-z]+):?")
_LOOKUP = re.compile(r"([f-z])([0-9])\?")


class Question(NamedTuple):
    """A question taken apart. "3fgh:" is Question(start="3", functions="fgh")."""

    start: str
    functions: str


class Piece(NamedTuple):
    """A piece of an episode: text of the policy, or an observation, which is given."""

    text: str
    given: bool = False


class Turn(NamedTuple):
    """A turn found in an episode: its first character, its text, and the observation after it ("" for the last turn)."""

    start: int
    text: str
    observation: str


def parse(question: str) -> Question:
    """Take a question apart. Raises DataError if it is no question of the task."""
    found = _QUESTION.fullmatch(question.strip())
    if found is None:
        raise DataError(f"{question!r} is not a question of the lookup task; it should read like '3fgh:'")
    return Question(found[1], found[2])


def alphabet(functions: int) -> str:
    """All characters of questions and episodes."""
    return "0123456789" + LETTERS[:functions] + ":" + ASK + END + MALFORMED + ANSWER


def table_of(prompt: Prompt) -> dict[str, str]:
    """The table of a prompt. Raises DataError if the data is of another type."""
    found = prompt.columns.get(TABLE)
    if not isinstance(found, dict):
        raise DataError(f'prompt {prompt.id!r} has no table to look up; set data.type = "lookup"')
    return found


def draw_table(question: str, functions: int, seed: int) -> dict[str, str]:
    """Draw the table of a question: every value of every function is each digit equally often."""
    values = rng.uniforms([rng.key("lookup table", seed, question)] * (functions * VALUES), range(functions * VALUES))
    digits = "".join(str(int(value * VALUES)) for value in values)
    return {name: digits[i * VALUES : (i + 1) * VALUES] for i, name in enumerate(LETTERS[:functions])}


def look_up(table: Table, text: str) -> str | None:
    """Result of a turn's lookup: "7" for "f3?"; None if it is malformed or asks for a function that the table lacks."""
    found = _LOOKUP.fullmatch(text)
    return table[found[1]][int(found[2])] if found is not None and found[1] in table else None


def observation(table: Table, text: str) -> str:
    """Observation after a turn: "7;", or "!;" for a malformed lookup."""
    return (look_up(table, text) or MALFORMED) + END


def right_lookups(question: str, table: Table) -> tuple[list[str], str]:
    """The lookups of all hops in order, and the answer: (["f3?", "g7?", "h2?"], "5")."""
    value, functions = parse(question)
    asked: list[str] = []
    for name in functions:
        asked.append(name + value + ASK)
        value = table[name][int(value)]
    return asked, value


def written_episode(question: str, table: Table, errors: float, recoveries: float) -> list[Piece]:
    """Write the episode that a warm start imitates; all draws depend on the question and the table alone.

    At each hop, with the probability `errors`, a wrong lookup comes first: another digit or another function, equally often.
    With the probability `recoveries` the right lookup follows, after the wrong one was carried on for 0 to all of the hops
    left, each number equally often; otherwise the wrong result is carried on to the answer.

    So an episode is right with the probability (1 - errors · (1 - recoveries)) ** hops.
    """
    value, functions = parse(question)
    address = rng.key("lookup episode", question, *table.values())
    draws = rng.uniforms([address] * (5 * len(functions)), range(5 * len(functions))).reshape(-1, 5)
    pieces: list[Piece] = []

    def ask(name: str, at: str) -> str:
        pieces.extend([Piece(name + at + ASK), Piece(observation(table, name + at + ASK), given=True)])
        return table[name][int(at)]

    for hop, (name, (errs, recovers, kind, which, delay)) in enumerate(zip(functions, draws, strict=True)):
        if errs < errors:
            found = ask(*_wrong(name, value, table, kind, which))
            if recovers >= recoveries:
                value = found
                continue
            for following in functions[hop + 1 : hop + 1 + int(delay * (len(functions) - hop))]:
                found = ask(following, found)
        value = ask(name, value)
    return [*pieces, Piece(ANSWER + value)]


def _wrong(name: str, at: str, table: Table, kind: float, which: float) -> tuple[str, str]:
    """A wrong lookup: of another digit or of another function."""
    if kind < 0.5:
        return name, str((int(at) + 1 + int(which * (VALUES - 1))) % VALUES)
    others = [each for each in table if each != name]
    return others[int(which * len(others))], at


def turns(table: Table, episode: str) -> Iterator[Turn]:
    """Turns of an episode, each with its observation.

    A lookup that reads well may have been malformed: the text does not show special tokens, which the environment has seen.

    Raises DataError if the text has another observation behind a turn: it is no episode of this table.
    """
    position = 0
    while position < len(episode):
        end = episode.find(ASK, position) + 1
        text = episode[position : end or len(episode)]
        seen = observation(table, text) if end else ""
        if end and episode[end : end + 1] == MALFORMED:
            seen = MALFORMED + END
        if not seen.startswith(episode[len(text) + position :][: len(seen)]):
            raise DataError(f"{episode!r} is no episode of its table: {text!r} is answered by {seen!r}")
        yield Turn(position, text, seen)
        position += len(text) + len(seen)


class Progress(NamedTuple):
    """Progress of an episode: hops whose right lookup was asked, in order, and the first wrong turn that stands."""

    hops: int
    error: int | None
    """Character offset of a turn."""
    solved: bool


def follow(question: str, table: Table, episode: str) -> Progress:
    """Follow an episode turn by turn.

    A wrong lookup stands until the right lookup of its hop follows. Behind the lookups of all hops, only a wrong answer is an
    error. A last turn that was cut off while right is no error.
    """
    right, answer = right_lookups(question, table)
    done, error = 0, None
    for turn in turns(table, episode):
        left = right[done:]
        if left and turn.text == left[0] and turn.observation[0] != MALFORMED:
            done, error = done + 1, None
        elif not turn.observation:
            wanted = left[0] if left else ANSWER + answer
            if not left and turn.text.strip() == wanted:
                return Progress(done, None, True)
            if error is None and not wanted.startswith(turn.text.strip()):
                error = turn.start
        elif left and error is None:
            error = turn.start
    return Progress(done, error, False)


def uniform_question(numbers: np.ndarray, functions: int) -> str:
    """Write the question of 1 + hops uniforms: every start and every function equally often."""
    names = "".join(LETTERS[int(each * functions)] for each in numbers[1:])
    return f"{int(numbers[0] * VALUES)}{names}:"
