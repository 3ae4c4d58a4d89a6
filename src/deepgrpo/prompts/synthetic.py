"""Synthetic tasks with checkable steps, for models of a few hundred kilobytes: questions, tokenizer, verifiers.

    type = "synthetic"   chained modular arithmetic (`chain.py`)
    type = "search"      signs are tried until a chain ends at a target (`search.py`)
    type = "lookup"      a question of several hops, looked up turn by turn (`lookup.py`)

The question is the whole prompt, so prompt + response reads `3+4*2-5:3+4=7;7*2=4;4-5=9;#9`. A solution ends with the
tokenizer's EOS, which is a token and not part of the text. Operands are 1..modulus-1, because a zero would add nothing
or erase the steps before it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from deepgrpo import rng
from deepgrpo.config import GeneratedData, LookupData, SearchData, SyntheticData
from deepgrpo.errors import ConfigError
from deepgrpo.prompts import chain, lookup, search
from deepgrpo.prompts.lookup import Piece
from deepgrpo.prompts.rows import QuestionRow
from deepgrpo.records import Prompt, Score

ALPHABET = "0123456789+-*=;#:"
"""All characters of chains whose errors are not corrected."""

_TEST_SHARE = 8  # one question in 8 belongs to the test split
_MAX_TRIES = 5000
_BLOCK = 32


def is_test(question: str) -> bool:
    """True for a question of the test split; depends on its text only, not on the seed."""
    return rng.key("synthetic split", question) % _TEST_SHARE == 0


def make(index: int, config: GeneratedData) -> QuestionRow:
    """Generate question `index` of a split: a pure function of the section's seed, split and shape, and of the index.

    Draws until the text is in the split. Two indices may give the same question; `make_distinct` drops the second.
    Raises ConfigError if no draw is in the split.
    """
    task = build_synthetic(config)
    for numbers in _draws(rng.key(config.type, config.seed, config.split, index), len(task.choices)):
        question = task.question(numbers)
        if is_test(question) == (config.split == "test") and task.allows(question):
            answer = task.answer(question)
            columns = {"question": question, "answer": answer, "solution": task.written_solution(question)}
            return QuestionRow(f"{config.type}-{config.split}-{index}", question, answer, columns | task.columns(question))
    raise ConfigError(
        f"{task.shape} allow {task.count} questions, and none of {_MAX_TRIES} draws fell into the split "
        f"{config.split!r}; raise one of the two"
    )


def _draws(address: int, size: int) -> Iterator[np.ndarray]:
    """`_MAX_TRIES` arrays of `size` uniforms: the first alone, which nearly always does for training, then in blocks."""
    for start in range(1 - _BLOCK, _MAX_TRIES, _BLOCK):
        start, stop = max(start, 0), start + _BLOCK
        counters = np.arange(start * size, stop * size)
        yield from rng.uniforms(np.full(len(counters), address, dtype=np.uint64), counters).reshape(-1, size)


def rows(config: GeneratedData, skipped: Counter[str]) -> list[QuestionRow]:
    """Distinct questions of a section with a size or a limit; no row is skipped."""
    return make_distinct(min(size for size in (config.size, config.limit) if size is not None), config)


def make_distinct(size: int, config: GeneratedData) -> list[QuestionRow]:
    """The first `size` distinct questions of a split, in order of their index.

    Raises ConfigError if the split has too few.
    """
    found: dict[str, QuestionRow] = {}
    task, most = build_synthetic(config), 20 * size + 10_000
    for index in range(most):
        row = make(index, config)
        found.setdefault(row.question, row)
        if len(found) == size:
            return list(found.values())
        # not enough yet: count what there is, where that is quicker than drawing on
        if index == 2 * size and task.count < most and (there := _count_split(config)) < size:
            break
    else:
        there = len(found)
    raise ConfigError(
        f"data.size (or data.limit) is {size}, but {task.shape} allow {task.count} questions in both splits, {there} of them "
        f"in {config.split!r}; lower the size or raise one of the two"
    )


def _count_split(config: GeneratedData) -> int:
    """Number of distinct questions in the split, by writing every question of the task once."""
    task = build_synthetic(config)
    questions = {task.question(np.array(each)) for each in product(*((np.arange(n) + 0.5) / n for n in task.choices))}
    return sum(is_test(each) == (config.split == "test") and task.allows(each) for each in questions)


def tokenizer(characters: str = ALPHABET) -> Any:
    """Character-level fast tokenizer over a task's `alphabet` with `<pad>` and `<eos>`; other characters are an error.

    Decoding inverts encoding exactly. Saves and loads like any other tokenizer.
    """
    # imported here: reading a recipe must not wait for transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *characters])}
    core = Tokenizer(models.WordLevel(vocabulary))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def alphabet(data: GeneratedData) -> str:
    """All characters of a task's questions and solutions."""
    if isinstance(data, LookupData):
        return lookup.alphabet(data.functions)
    if isinstance(data, SearchData):
        return ALPHABET + chain.RETRACT + "?"
    return ALPHABET if data.recovery == "none" else ALPHABET + chain.RETRACT


class _Chains:
    """Common base of the tasks whose questions are chains of signs and digits."""

    config: SyntheticData | SearchData

    @property
    def choices(self) -> list[int]:
        """The number of values that each uniform of a question chooses from."""
        operands = self.config.modulus - 1
        return [self.config.modulus, *(number for signs in self.signs for number in (len(signs), operands))]

    @property
    def signs(self) -> list[str]:
        """The operations that each place of a chain allows."""
        return [chain.OPERATIONS] * self.config.chain_length

    @property
    def count(self) -> int:
        """Upper bound of the number of questions in both splits together."""
        return math.prod(self.choices)

    @property
    def shape(self) -> str:
        """The keys that bound the number of questions, for messages."""
        return f"data.chain_length = {self.config.chain_length} and data.modulus = {self.config.modulus}"

    def columns(self, question: str) -> dict[str, Any]:
        """Columns besides question, answer and solution."""
        return {}

    def solution(self, prompt: Prompt) -> list[Piece]:
        """Solution for the warm start, in pieces of the policy's text and of given text."""
        return [Piece(self.written_solution(prompt.question))]

    def written_solution(self, question: str) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class ChainTask(_Chains):
    """Questions, solutions, verifier and first error of chained arithmetic."""

    config: SyntheticData

    @property
    def signs(self) -> list[str]:
        last = self.config.last_products
        return ["+-" if last else chain.OPERATIONS] * (self.config.chain_length - last) + ["*"] * last

    def question(self, numbers: np.ndarray) -> str:
        """Write the question of `2 * chain_length + 1` uniforms."""
        text = str(int(numbers[0] * self.config.modulus))
        for choice, (sign, operand) in zip(self.signs, numbers[1:].reshape(-1, 2), strict=True):
            text += choice[int(sign * len(choice))]
            text += str(1 + int(operand * (self.config.modulus - 1)))
        return text + ":"

    def allows(self, question: str) -> bool:
        return True

    def answer(self, question: str) -> str:
        return chain.right_segments(question, self.config.modulus)[-1][1:]

    def written_solution(self, question: str) -> str:
        """Solution for the warm start, with the errors, corrections and wrong facts that the section asks for."""
        config = self.config
        signs = "*" if config.last_products else chain.OPERATIONS
        facts = chain.wrong_facts(config.wrong_facts, config.modulus, config.seed, signs)
        return chain.written_solution(
            question, config.modulus, config.recovery, config.corrections, facts, config.doubt
        )

    def verify(self, prompt: Prompt, completion: str) -> Score:
        """1 if the answer is right, and without `luck` every step that stands too; `parsed` is False without '#'.

        The answer is the text after the last '#', ignoring white space around it.
        """
        right = chain.right_segments(prompt.question, self.config.modulus)
        _, found, answer = completion.rpartition("#")
        if not found:
            return Score(0.0, parsed=False)
        solved = answer.strip() == right[-1][1:]
        return Score(float(solved and (self.config.luck or chain.is_complete(self._standing(completion, right), right))))

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """The text that `verify` compares: everything after the last '#'."""
        return completion.rpartition("#")[2].strip() or None if "#" in completion else None

    def first_error(self, prompt: Prompt, completion: str) -> int | None:
        """Character offset of the first wrong segment that stands, or None without an error.

        A segment that differs from the solution's is wrong as a whole: the offset is that of its first character. An error
        that was retracted is none; errors that cancel out are errors, so a completion may verify and still have one.

        None: the completion is the solution (ignoring white space around the answer and at the end), or it was truncated
        before any error; so "", "3+4=7;7*" and a lone "#" behind all steps give None.
        """
        right = chain.right_segments(prompt.question, self.config.modulus)
        return chain.first_wrong(self._standing(completion, right), right)

    def _standing(self, completion: str, right: list[str]) -> list[chain.Segment]:
        return chain.standing(completion, len(right) - 1, self.config.recovery != "none")


@dataclass(frozen=True)
class SearchTask(_Chains):
    """Questions, solutions, verifier and first error of the search for signs."""

    config: SearchData

    def question(self, numbers: np.ndarray) -> str:
        """Write the question of `2 * chain_length + 1` uniforms."""
        modulus = self.config.modulus
        digits = (int(numbers[0] * modulus), *(1 + int(each * (modulus - 1)) for each in numbers[2::2]))
        signs = tuple(chain.OPERATIONS[int(each * len(chain.OPERATIONS))] for each in numbers[1::2])
        return "?".join(map(str, digits)) + f"={search.ending(digits, signs, modulus)}:"

    def allows(self, question: str) -> bool:
        """True if no more choices of signs fit than `most_fitting`."""
        return search.count_fitting(question, self.config.modulus) <= self.config.most_fitting

    def answer(self, question: str) -> str:
        """The choice of signs that fits, the first of them in the order of '+-*'."""
        return "".join(search.fitting(question, self.config.modulus)[0])

    def written_solution(self, question: str) -> str:
        return search.written_solution(question, self.config.modulus, self.config.most_tries)

    def verify(self, prompt: Prompt, completion: str) -> Score:
        """1 if the last try succeeds and claims it; `parsed` is False if it claims nothing."""
        _, success = search.first_wrong(prompt.question, completion, self.config.modulus)
        return Score(float(success), parsed="#" in completion.rpartition(chain.RETRACT)[2])

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """The signs of the last try if it claims success."""
        last = completion.rpartition(chain.RETRACT)[2]
        return "".join(step[1] for step in last.split(";")[:-1] if len(step) > 1) or None if "#" in last else None

    def first_error(self, prompt: Prompt, completion: str) -> int | None:
        """Character offset of the last try's first wrong step or untrue claim; see `search.first_wrong`."""
        return search.first_wrong(prompt.question, completion, self.config.modulus)[0]


@dataclass(frozen=True)
class LookupTask:
    """Questions, written episodes, verifier and first error of the lookups."""

    config: LookupData

    @property
    def choices(self) -> list[int]:
        """The number of values that each uniform of a question chooses from."""
        return [lookup.VALUES] + [self.config.functions] * self.config.hops

    @property
    def count(self) -> int:
        """Number of questions in both splits together."""
        return math.prod(self.choices)

    @property
    def shape(self) -> str:
        """The keys that bound the number of questions, for messages."""
        return f"data.hops = {self.config.hops} and data.functions = {self.config.functions}"

    def question(self, numbers: np.ndarray) -> str:
        """Write the question of `1 + hops` uniforms."""
        return lookup.uniform_question(numbers, self.config.functions)

    def allows(self, question: str) -> bool:
        return True

    def columns(self, question: str) -> dict[str, Any]:
        """The table, which the environment reads."""
        return {lookup.TABLE: self._table(question)}

    def answer(self, question: str) -> str:
        return lookup.right_lookups(question, self._table(question))[1]

    def written_solution(self, question: str) -> str:
        return "".join(text for text, _ in self._written(question, self._table(question)))

    def solution(self, prompt: Prompt) -> list[Piece]:
        """Episode for the warm start: turns, and observations, which are given."""
        return self._written(prompt.question, lookup.table_of(prompt))

    def verify(self, prompt: Prompt, completion: str) -> Score:
        """1 if an episode has looked up every hop and answers right; `parsed` is False without '#'.

        Raises DataError if an observation in it is not the table's.
        """
        solved = lookup.follow(prompt.question, lookup.table_of(prompt), completion).solved
        return Score(float(solved), parsed=lookup.ANSWER in completion)

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """The text behind the last '#'."""
        return completion.rpartition(lookup.ANSWER)[2].strip() or None if lookup.ANSWER in completion else None

    def first_error(self, prompt: Prompt, completion: str) -> int | None:
        """Character offset of the first wrong turn that stands; see `lookup.follow`."""
        return lookup.follow(prompt.question, lookup.table_of(prompt), completion).error

    def _table(self, question: str) -> dict[str, str]:
        return lookup.draw_table(question, self.config.functions, self.config.seed)

    def _written(self, question: str, table: lookup.Table) -> list[Piece]:
        return lookup.written_episode(question, table, self.config.errors, self.config.recoveries)


SyntheticTask = ChainTask | SearchTask | LookupTask


def build_synthetic(config: GeneratedData) -> SyntheticTask:
    """Build the task of a data section."""
    if isinstance(config, LookupData):
        return LookupTask(config)
    return SearchTask(config) if isinstance(config, SearchData) else ChainTask(config)
