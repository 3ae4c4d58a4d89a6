"""Solutions, verdicts and first errors of single questions of the synthetic task."""

from __future__ import annotations

from typing import Any

from deepgrpo.config import SyntheticData
from deepgrpo.feedback import Score
from deepgrpo.prompts.chain import right_segments
from deepgrpo.prompts.chain_task import ChainTask
from deepgrpo.records import Prompt


def ask(question: str) -> Prompt:
    return Prompt("p", question, (2,), question)


def solution(question: str, modulus: int = 10) -> str:
    return "".join(right_segments(question, modulus))


def verify(question: str, completion: str, modulus: int = 10, **knobs: Any) -> Score:
    return ChainTask(SyntheticData(modulus=modulus, **knobs)).verify(ask(question), completion)


def first_error(question: str, completion: str, modulus: int = 10, **knobs: Any) -> int | None:
    return ChainTask(SyntheticData(modulus=modulus, **knobs)).first_error(ask(question), completion)
