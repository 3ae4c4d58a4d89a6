"""The task of the lookups: questions, written episodes, verifier and first error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepgrpo.config import LookupData
from deepgrpo.feedback import Score
from deepgrpo.prompts import lookup
from deepgrpo.prompts.lookup import Piece
from deepgrpo.records import Prompt


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
