"""Chained modular arithmetic: a task with checkable steps, for models of a few hundred kilobytes.

    question   3+4*2-5:             start digit, then `chain_length` operations, strictly left to right, modulo 10
    solution   3+4=7;7*2=4;4-5=9;#9   one step per operation, then the answer after '#'

The question is the whole prompt, so prompt + response reads `3+4*2-5:3+4=7;7*2=4;4-5=9;#9`. A solution ends with the
tokenizer's EOS, which is a token and not part of the text. Operands are 1..modulus-1, because a zero would add nothing
or erase the steps before it.

Language models can train on the task too: `verify` reads only the text after the last '#'.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepgrpo import rng
from deepgrpo.config import SyntheticData
from deepgrpo.errors import ConfigError, DataError
from deepgrpo.prompts.rows import QuestionRow
from deepgrpo.records import Prompt, Score

ALPHABET = "0123456789+-*=;#:"
"""All characters of questions and solutions."""

_OPERATIONS = "+-*"
_TEST_SHARE = 8  # one question in 8 belongs to the test split
_MAX_TRIES = 2000


def solution(question: str, modulus: int) -> str:
    """Written chain of thought of a question.

    >>> solution("3+4*2-5:", 10)
    '3+4=7;7*2=4;4-5=9;#9'
    """
    return "".join(_segments(question, modulus))


def verify(question: str, completion: str, modulus: int) -> Score:
    """1 if the text after the last '#' is the result, ignoring white space around it; `parsed` is False without '#'.

    Steps are not checked; see `first_error`.
    """
    _, found, answer = completion.rpartition("#")
    if not found:
        return Score(0.0, parsed=False)
    return Score(float(answer.strip() == _segments(question, modulus)[-1][1:]))


def first_error(question: str, completion: str, modulus: int) -> int | None:
    """Character offset of the first wrong segment of a completion, or None without an error.

    A segment is a step with its ';', or the final '#...' with everything after it. A segment that differs from the
    solution's is wrong as a whole: the offset is that of its first character.

    None: the completion is the solution (ignoring white space around the answer and at the end), or it was truncated
    before any error; so "", "3+4=7;7*" and a lone "#" give None. Errors that cancel out are errors: a completion may
    verify and still have a first error.

    >>> first_error("3+4*2-5:", "3+4=7;7*2=5;5-5=0;#0", 10)
    6
    """
    *steps, answer = _segments(question, modulus)
    position = 0
    for step in steps:
        rest = completion[position:].rstrip()
        if rest.startswith(step):
            position += len(step)
        else:
            return None if step.startswith(rest) else position
    rest = completion[position:].rstrip()
    right = rest == "" or (rest[0] == "#" and rest[1:].strip() in ("", answer[1:]))
    return None if right else position


def is_test(question: str) -> bool:
    """True for a question of the test split; depends on its text only, not on the seed."""
    return rng.key("synthetic split", question) % _TEST_SHARE == 0


def make(index: int, config: SyntheticData) -> QuestionRow:
    """Generate question `index` of a split: a pure function of (seed, split, index, chain_length, modulus).

    Draws until the text is in the split. Two indices may give the same question; `make_distinct` drops the second.
    Raises ConfigError if no draw is in the split.
    """
    draws = 2 * config.chain_length + 1
    address = np.full(draws, rng.key("synthetic", config.seed, config.split, index), dtype=np.uint64)
    for attempt in range(_MAX_TRIES):
        numbers = rng.uniforms(address, np.arange(draws) + attempt * draws)
        question = str(int(numbers[0] * config.modulus))
        for sign, operand in numbers[1:].reshape(-1, 2):
            question += _OPERATIONS[int(sign * len(_OPERATIONS))] + str(1 + int(operand * (config.modulus - 1)))
        question += ":"
        if is_test(question) == (config.split == "test"):
            answer = _segments(question, config.modulus)[-1][1:]
            columns = {"question": question, "answer": answer, "solution": solution(question, config.modulus)}
            return QuestionRow(f"synthetic-{config.split}-{index}", question, answer, columns)
    raise ConfigError(
        f"data.chain_length = {config.chain_length} and data.modulus = {config.modulus} allow {_count(config)} "
        f"questions, and none of {_MAX_TRIES} draws fell into the split {config.split!r}; raise one of the two"
    )


def rows(config: SyntheticData, skipped: Counter[str]) -> list[QuestionRow]:
    """Distinct questions of a section with a size or a limit; no row is skipped."""
    return make_distinct(min(size for size in (config.size, config.limit) if size is not None), config)


def make_distinct(size: int, config: SyntheticData) -> list[QuestionRow]:
    """The first `size` distinct questions of a split, in order of their index.

    Raises ConfigError if the split has too few.
    """
    found: dict[str, QuestionRow] = {}
    for index in range(20 * size + 10_000):
        row = make(index, config)
        found.setdefault(row.question, row)
        if len(found) == size:
            return list(found.values())
    raise ConfigError(
        f"data.size (or data.limit) is {size}, but data.chain_length = {config.chain_length} and data.modulus = "
        f"{config.modulus} allow {_count(config)} questions in both splits, {len(found)} of them found in "
        f"{config.split!r}; lower the size or raise one of the two"
    )


def tokenizer() -> Any:
    """Character-level fast tokenizer over ALPHABET with `<pad>` and `<eos>`; other characters are an error.

    Decoding inverts encoding exactly. Saves and loads like any other tokenizer.
    """
    # imported here: reading a recipe must not wait for transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *ALPHABET])}
    core = Tokenizer(models.WordLevel(vocabulary))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


@dataclass(frozen=True, slots=True)
class SyntheticTask:
    """Solution, verifier and first error for prompts of one data section."""

    config: SyntheticData

    def solution(self, prompt: Prompt) -> str:
        return solution(prompt.question, self.config.modulus)

    def verify(self, prompt: Prompt, completion: str) -> Score:
        return verify(prompt.question, completion, self.config.modulus)

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """The text that `verify` compares: everything after the last '#'."""
        return completion.rpartition("#")[2].strip() or None if "#" in completion else None

    def first_error(self, prompt: Prompt, completion: str) -> int | None:
        return first_error(prompt.question, completion, self.config.modulus)


def _segments(question: str, modulus: int) -> list[str]:
    """Steps and answer of the solution: ["3+4=7;", "7*2=4;", "4-5=9;", "#9"]."""
    chain = question.strip().rstrip(":")
    signs, digits = chain[1::2], chain[::2]
    if not digits.isdecimal() or len(digits) != len(signs) + 1 or set(signs) - set(_OPERATIONS):
        raise DataError(f"{question!r} is not a question of the synthetic task; it should read like '3+4*2-5:'")
    value, segments = int(digits[0]), []
    for sign, operand in zip(signs, map(int, digits[1:]), strict=True):
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % modulus
        segments.append(f"{value}{sign}{operand}={result};")
        value = result
    return [*segments, f"#{value}"]


def _count(config: SyntheticData) -> int:
    count: int = config.modulus * (len(_OPERATIONS) * (config.modulus - 1)) ** config.chain_length
    return count
