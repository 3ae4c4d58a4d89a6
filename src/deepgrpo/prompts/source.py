"""Prompts in a reproducible order, with a cursor from which a resumed run continues exactly.

    rows of a file or a task ─► rendered ─► too long? ─► shuffled every epoch ─► take(cursor, n)

Rows are rendered and tokenized when taken; they are also tokenized once at the start, to measure their length and to know
the data again when a run is resumed (fingerprint.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from deepgrpo import rng
from deepgrpo.config import DataConfig, GeneratedData
from deepgrpo.config.placeholders import Placeholder
from deepgrpo.errors import ConfigError, DataError, ModelError
from deepgrpo.prompts import synthetic
from deepgrpo.prompts.chat import Renderer, build_renderer
from deepgrpo.prompts.filling import refuse_unfilled
from deepgrpo.prompts.fingerprint import Digest
from deepgrpo.prompts.rows import BAD_ENCODING, EMPTY_QUESTION, NO_ANSWER, NO_VALUE, TOO_LONG, QuestionRow
from deepgrpo.prompts.tasks import read_rows
from deepgrpo.records import Prompt

_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Cursor:
    """Position of the next prompt. Example: Cursor(epoch=2, position=64) comes after 64 prompts of the third pass."""

    epoch: int = 0
    position: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Cursor:
        return cls(int(state["epoch"]), int(state["position"]))


class PromptSource:
    """Prompts in a reproducible order; created by `build_source`."""

    def __init__(
        self,
        rows: Sequence[QuestionRow] | Callable[[int], QuestionRow],
        renderer: Renderer,
        *,
        seed: int,
        shuffle: bool,
        skipped: Mapping[str, int],
        digest: str = "",
    ) -> None:
        """`rows` is a function of the index for an endless source; `digest` is that of `fingerprint.Digest`."""
        self._rows = rows
        self._renderer = renderer
        self._seed = seed
        self._shuffle = shuffle
        self.skipped: Mapping[str, int] = dict(skipped)
        """Number of skipped rows by reason."""
        self.digest = digest
        self.order_seed = seed if shuffle and not callable(rows) else None

    @property
    def size(self) -> int | None:
        """Number of prompts; None for an endless source."""
        return None if callable(self._rows) else len(self._rows)

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError("an endless source has no length; use `size`, which is None")
        return self.size

    def __bool__(self) -> bool:
        return True  # no source is empty, and an endless one has no length

    def take(self, cursor: Cursor, num_prompts: int) -> tuple[tuple[Prompt, ...], Cursor]:
        """The next prompts and the cursor after them: a pure function of the cursor.

        A finite source continues with the next epoch, in a new order; an endless one only counts positions.
        """
        rows: list[QuestionRow] = []
        if callable(self._rows):
            rows = [self._rows(cursor.position + i) for i in range(num_prompts)]
            cursor = replace(cursor, position=cursor.position + num_prompts)
        else:
            while len(rows) < num_prompts:
                order = self._order(cursor.epoch)
                picked = order[cursor.position : cursor.position + num_prompts - len(rows)]
                rows += [self._rows[i] for i in picked]
                cursor = replace(cursor, position=cursor.position + len(picked))
                if cursor.position >= len(order):
                    cursor = Cursor(cursor.epoch + 1)
        return self._prompts(rows), cursor

    def head(self, num_prompts: int) -> tuple[Prompt, ...]:
        """The first prompts in data order, at most all, for evaluation."""
        rows = self._rows
        return self._prompts([rows(i) for i in range(num_prompts)] if callable(rows) else rows[:num_prompts])

    def at(self, indices: Sequence[int]) -> tuple[Prompt, ...]:
        """Prompts by their numbers in data order; of a finite source."""
        rows = self._rows
        assert not callable(rows)
        return self._prompts([rows[i] for i in indices])

    def _order(self, epoch: int) -> list[int]:
        count = len(self)
        if not self._shuffle:
            return list(range(count))
        return [int(i) for i in rng.generator(self._seed, "shuffle", epoch).permutation(count)]

    def _prompts(self, rows: Sequence[QuestionRow]) -> tuple[Prompt, ...]:
        texts = [self._renderer.text(row.question, row.columns) for row in rows]
        tokens = self._renderer.tokenize(texts)
        return tuple(_prompt(*item) for item in zip(rows, texts, tokens, strict=True))


def build_source(
    data: DataConfig, tokenizer: Any, *, seed: int, context: int, shuffle: bool = True, name: str | None = None
) -> PromptSource:
    """Read and check the data.

    Args:
        data: the section `data`. `limit` keeps the first rows of the data, skipped ones included.
        tokenizer: a transformers tokenizer. For the synthetic task it needs no chat template: its questions are then
            plain text, unless `template.chat` is set.
        seed: seed of the shuffle (generated data has a seed of its own).
        context: longest prompt plus response, in tokens. A prompt may take half of it, or `max_prompt_tokens`, and
            always leaves room for one token.
        shuffle: reshuffle every epoch. An endless source is random by construction.
        name: begins the messages, where there are several data sets.

    Raises DataError (see `prompts.rows` and `prompts.jsonl`, or no row is left), ConfigError, ModelError,
    MissingExtraError.
    """
    try:
        return _build(data, tokenizer, seed, context, shuffle)
    except (ConfigError, DataError, ModelError) as error:
        if name is None:
            raise
        raise type(error)(f"{name}: {error}") from error


def _build(data: DataConfig, tokenizer: Any, seed: int, context: int, shuffle: bool) -> PromptSource:
    is_synthetic = isinstance(data, GeneratedData)
    renderer = build_renderer(data.template, tokenizer, plain_if_no_template=is_synthetic)
    longest = min(data.max_prompt_tokens or max(context // 2, 1), context - 1)
    skipped: Counter[str] = Counter()
    if isinstance(data, GeneratedData) and data.size is None and data.limit is None:
        # all questions have the same number of characters, so a few suffice
        _, digest = _usable([synthetic.make(i, data) for i in range(8)], renderer, longest, skipped, data)
        make = partial(synthetic.make, config=data)
        return PromptSource(make, renderer, seed=seed, shuffle=shuffle, skipped={}, digest=digest)
    rows, digest = _usable(read_rows(data, skipped), renderer, longest, skipped, data)
    return PromptSource(rows, renderer, seed=seed, shuffle=shuffle, skipped=skipped, digest=digest)


def _usable(
    rows: Sequence[QuestionRow], renderer: Renderer, longest: int, skipped: Counter[str], data: DataConfig
) -> tuple[list[QuestionRow], str]:
    """Rows that fill the template and whose prompt has at most `longest` tokens, and their digest.

    Raises DataError if none is left, ConfigError if no row fills a placeholder.
    """
    kept: list[QuestionRow] = []
    shortest: int | None = None
    digest = Digest()
    lacking: Counter[Placeholder] = Counter()
    for start in range(0, len(rows), _CHUNK):  # in chunks, to bound the memory for tokens
        lacks = [(row, renderer.lacks(row.question, row.columns)) for row in rows[start : start + _CHUNK]]
        lacking.update(each for _, some in lacks for each in some)
        chunk = [row for row, some in lacks if not any(each.required for each in some)]
        skipped[NO_VALUE] += len(lacks) - len(chunk)
        texts = [renderer.text(row.question, row.columns) for row in chunk]
        for row, tokens in zip(chunk, renderer.tokenize(texts), strict=True):
            length = len(tokens)
            if 0 < length <= longest:
                kept.append(row)
                digest.add(row, tokens)
            skipped[TOO_LONG] += length > longest
            skipped[EMPTY_QUESTION] += length == 0
            if length:
                shortest = length if shortest is None else min(shortest, length)
    if rows:
        refuse_unfilled(data.template, lacking, [row.columns for row in rows])
    for reason in [reason for reason, count in skipped.items() if not count]:
        del skipped[reason]
    if not kept:
        raise DataError(_none_left(data, skipped, shortest, longest))
    return kept, digest.hex()


def _none_left(data: DataConfig, skipped: Counter[str], shortest: int | None, longest: int) -> str:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
    if shortest is not None:
        hint = (
            f"the shortest prompt has {shortest} tokens and max_prompt_tokens is {longest} (default: half of the "
            "context, at most all of it but one token); raise data.max_prompt_tokens or sampling.max_total_tokens, "
            "or use a model with more context"
        )
    elif skipped[NO_VALUE]:
        hint = "every row lacks a value of some column that template.user or template.system names"
    elif skipped[NO_ANSWER]:
        hint = 'set data.columns.answer to the column with the answers, or to "none" if the reward needs none'
    else:
        hint = f"repair the data, or check data.columns.question (skipped as {BAD_ENCODING!r}: not UTF-8)"
    return f"no usable row is left in the data of type {data.type!r} ({reasons}); {hint}"


def _prompt(row: QuestionRow, text: str, tokens: tuple[int, ...]) -> Prompt:
    if isinstance(row.answer, list):
        return Prompt(row.id, text, tokens, row.question, row.answer[0], row.columns, tuple(row.answer))
    return Prompt(row.id, text, tokens, row.question, row.answer, row.columns)
