"""Synthetic tasks with checkable steps, for models of a few hundred kilobytes: drawing of questions, splits, tokenizer.

    type = "synthetic"   chained modular arithmetic (`chain_task.py`)
    type = "search"      signs are tried until a chain ends at a target (`search_task.py`)
    type = "lookup"      a question of several hops, looked up turn by turn (`lookup_task.py`)

The question is the whole prompt, so prompt + response reads `3+4*2-5:3+4=7;7*2=4;4-5=9;#9`. A solution ends with the
tokenizer's EOS, which is a token and not part of the text. Operands are 1..modulus-1, because a zero would add nothing
or erase the steps before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from deepgrpo import rng
from deepgrpo.config import GeneratedData, LookupData, SearchData
from deepgrpo.errors import ConfigError
from deepgrpo.prompts import chain, lookup
from deepgrpo.prompts.chain_task import ChainTask
from deepgrpo.prompts.lookup_task import LookupTask
from deepgrpo.prompts.rows import QuestionRow
from deepgrpo.prompts.search_task import SearchTask

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


SyntheticTask = ChainTask | SearchTask | LookupTask


def build_synthetic(config: GeneratedData) -> SyntheticTask:
    """Build the task of a data section."""
    if isinstance(config, LookupData):
        return LookupTask(config)
    return SearchTask(config) if isinstance(config, SearchData) else ChainTask(config)
