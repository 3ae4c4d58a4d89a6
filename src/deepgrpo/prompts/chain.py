"""Chains of modular arithmetic as text: written solutions, retracted steps, and the first wrong segment of a response.

    question   3+4*2-5:                      strictly left to right, modulo 10
    solution   3+4=7;7*2=4;4-5=9;#9          one step per operation, then the answer after '#'
    at_once    3+4=8;!3+4=7;7*2=4;4-5=9;#9   '!' retracts the step before it, which is then written again
    after_answer   3+4=8;8*2=6;6-5=1;#1!3+4=7;7*2=4;4-5=9;#9     '!' behind an answer retracts the whole chain

A segment is a step with its ';', or an answer '#...' up to its end. The segments that no '!' retracts *stand*; a response is
right if those that stand are the solution's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from deepgrpo import rng
from deepgrpo.config import Recovery
from deepgrpo.errors import DataError

OPERATIONS = "+-*"
RETRACT = "!"

Fact = tuple[int, str, int]
"""Operands and operation, e.g. (3, "+", 4)."""


class Segment(NamedTuple):
    """A segment of a response: its first character, counted from the start of the response, and its text without '!'."""

    start: int
    text: str


class Question(NamedTuple):
    """A question taken apart. "3+4*2-5:" is Question(start=3, operations=(("+", 4), ("*", 2), ("-", 5)))."""

    start: int
    operations: tuple[tuple[str, int], ...]


def parse(question: str) -> Question:
    """Take a question apart. Raises DataError if it is no question of the task."""
    chain = question.strip().rstrip(":")
    signs, digits = chain[1::2], chain[::2]
    if not digits.isdecimal() or len(digits) != len(signs) + 1 or set(signs) - set(OPERATIONS):
        raise DataError(f"{question!r} is not a question of the synthetic task; it should read like '3+4*2-5:'")
    return Question(int(digits[0]), tuple(zip(signs, map(int, digits[1:]), strict=True)))


def compute(fact: Fact, modulus: int) -> int:
    """Compute a step's result, e.g. 7 for (3, "+", 4) modulo 10."""
    left, sign, right = fact
    return int({"+": left + right, "-": left - right, "*": left * right}[sign] % modulus)


def segments(question: str, result: Callable[[int, Fact], int]) -> list[str]:
    """Write a chain whose step i has the result `result(i, fact)`, carried on: ["3+4=7;", "7*2=4;", "4-5=9;", "#9"]."""
    start, operations = parse(question)
    value, written = start, []
    for index, (sign, operand) in enumerate(operations):
        done = result(index, (value, sign, operand))
        written.append(f"{value}{sign}{operand}={done};")
        value = done
    return [*written, f"#{value}"]


def right_segments(question: str, modulus: int) -> list[str]:
    """The segments of the right solution."""
    return segments(question, lambda _, fact: compute(fact, modulus))


def written_solution(
    question: str,
    modulus: int,
    recovery: Recovery = "none",
    corrections: float = 0.0,
    facts: Mapping[Fact, int] | None = None,
    doubt: float = 0.0,
) -> str:
    """Write the solution that a warm start imitates.

    With the probability `corrections` it contains one wrong result and its correction: the step (each equally often) and the
    wrong result (each other value equally often) depend on the question alone.

    Args:
        recovery: where the error is corrected; "none": no errors are written.
        facts: results that are believed instead of the right ones, see `wrong_facts`; the chain carries them on.
        doubt: probability that a believed result is written right after all; question and step decide.

    >>> written_solution("3+4*2-5:", 10)
    '3+4=7;7*2=4;4-5=9;#9'
    """
    believed = facts or {}

    def result(step: int, fact: Fact) -> int:
        doubted = doubt > 0 and fact in believed and rng.uniforms([rng.key("synthetic doubt", question)], [step])[0] < doubt
        return compute(fact, modulus) if doubted else believed.get(fact, compute(fact, modulus))

    good = segments(question, result)
    drawn, where, by = rng.uniforms([rng.key("synthetic solution", question)] * 3, range(3))
    if recovery == "none" or drawn >= corrections:
        return "".join(good)
    at = int(where * (len(good) - 1))
    bad = segments(
        question, lambda i, fact: (result(i, fact) + (1 + int(by * (modulus - 1)) if i == at else 0)) % modulus
    )
    if recovery == "at_once":
        return "".join([*good[:at], bad[at], RETRACT, *good[at:]])
    return "".join([*bad, RETRACT, *good])


def asked_early(solution: str, draw: float) -> tuple[str, str]:
    """A solution cut before one of its steps and asked for its answer: (beginning and '#', answer).

    Args:
        draw: in [0, 1); each step is as likely as the others.

    >>> [asked_early("3+4=7;7*2=4;4-5=9;#9", draw) for draw in (0.0, 0.5, 0.99)]
    [('#', '9'), ('3+4=7;#', '9'), ('3+4=7;7*2=4;#', '9')]
    """
    steps = solution.split(";")[:-1]
    begun = steps[: int(draw * len(steps))]
    return "".join(f"{step};" for step in begun) + "#", solution.rpartition("#")[2]


@cache
def wrong_facts(share: float, modulus: int, seed: int, signs: str = OPERATIONS) -> Mapping[Fact, int]:
    """Draw the facts about `signs` that a warm start gets wrong, always in the same way: round(share × their number)."""
    every = [(a, sign, b) for a in range(modulus) for sign in signs for b in range(1, modulus)]
    keys = [rng.key("synthetic facts", seed, modulus, a, sign, b) for a, sign, b in every]
    order, by = rng.uniforms(keys, [0] * len(keys)), rng.uniforms(keys, [1] * len(keys))
    chosen = np.argsort(order)[: round(share * len(every))]
    return {every[i]: (compute(every[i], modulus) + 1 + int(by[i] * (modulus - 1))) % modulus for i in chosen}


def standing(response: str, steps: int, recovery: bool) -> list[Segment]:
    """Segments of a response that no '!' retracts, in order.

    Args:
        steps: steps of a full chain; what follows them is an answer.
        recovery: '!' ends an answer and retracts; otherwise it is an ordinary character.

    A '!' with nothing before it to retract stands itself, and everything behind it with it.
    """
    kept: list[Segment] = []
    position = 0
    while position < len(response):
        if recovery and response[position] == RETRACT:
            if not kept:
                return [Segment(position, response[position:])]
            if len(kept) > steps or kept[-1].text.startswith("#"):
                kept.clear()
            else:
                kept.pop()
            position += 1
            continue
        answers = len(kept) >= steps or response[position] == "#"
        ends = [] if answers else [response.find(";", position) + 1]
        if recovery:
            ends.append(response.find(RETRACT, position))
        end = min((end for end in ends if end > 0), default=len(response))
        kept.append(Segment(position, response[position:end]))
        position = end
    return kept


def first_wrong(kept: Sequence[Segment], right: Sequence[str]) -> int | None:
    """Character offset of the first segment that stands and is wrong; None if all are right so far.

    A segment that was cut off while right is not wrong, and white space around the answer is ignored.
    """
    for index, segment in enumerate(kept):
        if index >= len(right):
            return segment.start
        text, want = segment.text, right[index]
        if want.startswith("#"):
            if text.strip() and not (text[0] == "#" and text[1:].strip() in ("", want[1:])):
                return segment.start
        elif text != want and not (index == len(kept) - 1 and want.startswith(text.rstrip())):
            return segment.start
    return None


def is_complete(kept: Sequence[Segment], right: Sequence[str]) -> bool:
    """True if the segments that stand are the whole solution: every step right, and the answer with them."""
    return (
        len(kept) == len(right)
        and all(segment.text == want for segment, want in zip(kept[:-1], right[:-1], strict=True))
        and kept[-1].text[:1] == "#" and kept[-1].text[1:].strip() == right[-1][1:]
    )  # fmt: skip
