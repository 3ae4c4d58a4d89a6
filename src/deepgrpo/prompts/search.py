"""A search by trial as text: signs are tried between given digits until the chain ends at the target.

    question   3?4?2?5=9:                 which of + - * between the digits gives 9, strictly left to right, modulo 10
    response   3+4=7;7+2=9;9+5=4;!3+4=7;7*2=4;4-5=9;#      two tries; '!' gives the try before it up, '#' claims success

A claim counts only behind a full try that is computed right, uses the question's digits in order and ends at the target. A
guess is right as often as there are signs that fit (`share_of_signs`), and a failed try can always be followed by another.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from deepgrpo import rng
from deepgrpo.errors import DataError
from deepgrpo.prompts.chain import OPERATIONS, RETRACT, compute

_QUESTION = re.compile(r"(\d(?:\?\d)+)=(\d):?")


class Question(NamedTuple):
    """A question taken apart. "3?4?2?5=9:" is Question(digits=(3, 4, 2, 5), target=9)."""

    digits: tuple[int, ...]
    target: int


def parse(question: str) -> Question:
    """Take a question apart. Raises DataError if it is no question of the task."""
    found = _QUESTION.fullmatch(question.strip())
    if found is None:
        raise DataError(f"{question!r} is not a question of the search task; it should read like '3?4?2?5=9:'")
    return Question(tuple(int(digit) for digit in found[1].split("?")), int(found[2]))


def ending(digits: tuple[int, ...], signs: tuple[str, ...], modulus: int) -> int:
    """Compute where a choice of signs ends."""
    value = digits[0]
    for sign, digit in zip(signs, digits[1:], strict=True):
        value = compute((value, sign, digit), modulus)
    return value


def fitting(question: str, modulus: int) -> list[tuple[str, ...]]:
    """All choices of signs that end at the target."""
    digits, target = parse(question)
    every = itertools.product(OPERATIONS, repeat=len(digits) - 1)
    return [signs for signs in every if ending(digits, signs, modulus) == target]


def count_fitting(question: str, modulus: int) -> int:
    """Count the choices of signs that end at the target, by the number of ways to each value."""
    digits, target = parse(question)
    ways = Counter({digits[0]: 1})
    for digit in digits[1:]:
        after: Counter[int] = Counter()
        for value, count in ways.items():
            for sign in OPERATIONS:
                after[compute((value, sign, digit), modulus)] += count
        ways = after
    return ways[target]


def written_try(digits: tuple[int, ...], signs: tuple[str, ...], modulus: int) -> str:
    """Write one try: "3+4=7;7*2=4;4-5=9;"."""
    value, written = digits[0], ""
    for sign, digit in zip(signs, digits[1:], strict=True):
        result = compute((value, sign, digit), modulus)
        written += f"{value}{sign}{digit}={result};"
        value = result
    return written


def written_solution(question: str, modulus: int, most_tries: int) -> str:
    """Write the search that a warm start imitates: distinct choices in random order until one fits.

    The order depends on the question alone. Of a search longer than `most_tries`, the last ones are kept.
    """
    digits, target = parse(question)
    every = list(itertools.product(OPERATIONS, repeat=len(digits) - 1))
    order = np.argsort(rng.uniforms([rng.key("synthetic search", question)] * len(every), range(len(every))))
    tried: list[str] = []
    for index in order:
        tried.append(written_try(digits, every[index], modulus))
        if ending(digits, every[index], modulus) == target:
            return RETRACT.join(tried[-most_tries:]) + "#"
    raise DataError(f"{question!r} has no choice of signs that ends at {target} modulo {modulus}")


def first_wrong(question: str, response: str, modulus: int) -> tuple[int | None, bool]:
    """Find the first wrong segment of the last try.

    Returns:
        the character offset of its first wrong step, or of a '#' that claims too much; None if the try was cut off while
        right, or succeeds.
        True if the last try succeeds and claims it.
    """
    digits, target = parse(question)
    start = response.rfind(RETRACT) + 1
    position, value = start, digits[0]
    for digit in digits[1:]:
        end = response.find(";", position) + 1
        text = response[position : end or len(response)]
        steps = [f"{value}{sign}{digit}={compute((value, sign, digit), modulus)};" for sign in OPERATIONS]
        if end == 0 and any(step.startswith(text.rstrip()) for step in steps):
            return None, False
        if text not in steps:
            return position, False
        value = compute((value, text[1], digit), modulus)
        position = end
    rest = response[position:].strip()
    if rest in ("", "#") and (value == target or rest == ""):
        return None, rest == "#"
    return position, False
