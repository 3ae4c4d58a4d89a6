"""The task of the search for signs: questions, solutions, verifier and first error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepgrpo.config import SearchData
from deepgrpo.feedback import Score
from deepgrpo.prompts import chain, search
from deepgrpo.prompts.chain_task import Chains
from deepgrpo.records import Prompt


@dataclass(frozen=True)
class SearchTask(Chains):
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
