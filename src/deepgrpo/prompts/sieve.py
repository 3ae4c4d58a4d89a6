"""Rows that can be used: rendered, tokenized, and counted under a reason where they cannot.

    row ─► all placeholders have a value? ─► rendered, tokenized ─► too long? ─► prompt
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from deepgrpo.config import TemplateConfig
from deepgrpo.config.placeholders import Placeholder
from deepgrpo.errors import DataError
from deepgrpo.prompts.chat import Renderer
from deepgrpo.prompts.filling import refuse_unfilled
from deepgrpo.prompts.rows import BAD_ENCODING, EMPTY_QUESTION, NO_ANSWER, NO_VALUE, TOO_LONG, QuestionRow
from deepgrpo.records import Prompt


class Sieve:
    """Renders rows and keeps those that can be used.

    Args:
        renderer: the template, bound to a tokenizer.
        longest: longest prompt in tokens.
        source: name of the source in a mix; "" outside one.
    """

    def __init__(self, renderer: Renderer, longest: int, source: str = "") -> None:
        self._renderer, self._longest, self._source = renderer, longest, source
        self.skipped: Counter[str] = Counter()
        """Rows left out, by reason; the reader of the rows counts here too."""
        self._lacking: Counter[Placeholder] = Counter()
        self._shortest: int | None = None

    def usable(self, rows: Sequence[QuestionRow]) -> list[tuple[QuestionRow, Prompt]]:
        """The rows that can be used, each with its prompt."""
        lacks = [(row, self._renderer.lacks(row.question, row.columns)) for row in rows]
        self._lacking.update(each for _, some in lacks for each in some)
        filled = [row for row, some in lacks if not any(each.required for each in some)]
        self.skipped[NO_VALUE] += len(rows) - len(filled)
        texts = [self._renderer.text(row.question, row.columns, row.messages) for row in filled]
        kept = []
        for row, text, tokens in zip(filled, texts, self._renderer.tokenize(texts), strict=True):
            length = len(tokens)
            if 0 < length <= self._longest:
                kept.append((row, self.prompt(row, text, tokens)))
            self.skipped[TOO_LONG] += length > self._longest
            self.skipped[EMPTY_QUESTION] += length == 0
            if length:
                self._shortest = length if self._shortest is None else min(self._shortest, length)
        return kept

    def prompts(self, rows: Sequence[QuestionRow]) -> tuple[Prompt, ...]:
        """The prompts of rows that are known to be usable."""
        texts = [self._renderer.text(row.question, row.columns, row.messages) for row in rows]
        tokens = self._renderer.tokenize(texts)
        return tuple(self.prompt(*each) for each in zip(rows, texts, tokens, strict=True))

    def prompt(self, row: QuestionRow, text: str, tokens: tuple[int, ...]) -> Prompt:
        answer, accepted = (row.answer[0], tuple(row.answer)) if isinstance(row.answer, list) else (row.answer, ())
        name, columns = row.id, row.columns
        if self._source:
            name, columns = f"{self._source}/{row.id}", {"data_source": self._source, **columns}
        return Prompt(name, text, tokens, row.question, answer, columns, accepted, row.messages, self._source)

    def refuse_unfilled(self, template: TemplateConfig, columns: Sequence[Mapping[str, Any]]) -> None:
        """Raise ConfigError if no row seen so far fills some placeholder; `columns` are those of all of them."""
        if columns:
            refuse_unfilled(template, self._lacking, columns)

    def counted(self) -> dict[str, int]:
        """Rows left out, by reason, without reasons that did not occur."""
        return {reason: count for reason, count in self.skipped.items() if count}

    def none_left(self, kind: str, among: str = "") -> DataError:
        """The error for data of which no row can be used; `among` says which rows were looked at, if not all."""
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.counted().items())
        if self._shortest is not None:
            hint = (
                f"the shortest prompt has {self._shortest} tokens and max_prompt_tokens is {self._longest} (default: half of "
                "the context, at most all of it but one token); raise data.max_prompt_tokens or sampling.max_total_tokens, "
                "or use a model with more context"
            )
        elif self.skipped[NO_VALUE]:
            hint = "every row lacks a value of some column that template.user or template.system names"
        elif self.skipped[NO_ANSWER]:
            hint = 'set data.columns.answer to the column with the answers, or to "none" if the reward needs none'
        else:
            hint = f"repair the data, or check data.columns.question (skipped as {BAD_ENCODING!r}: not UTF-8)"
        return DataError(f"no usable row is left in the data of type {kind!r}{among} ({reasons}); {hint}")
