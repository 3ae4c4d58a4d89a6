"""The task of chained arithmetic: questions, solutions, verifier and first error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepgrpo.config import SearchData, SyntheticData
from deepgrpo.feedback import Score
from deepgrpo.prompts import chain
from deepgrpo.prompts.lookup import Piece
from deepgrpo.records import Prompt


class Chains:
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
class ChainTask(Chains):
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
