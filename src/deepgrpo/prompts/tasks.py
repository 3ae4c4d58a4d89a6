"""Tasks: data that brings its own verifier."""

from __future__ import annotations

from typing import Protocol

from deepgrpo.config import DataConfig, ReasoningGymData, SyntheticData
from deepgrpo.prompts.gym import build_gym
from deepgrpo.prompts.synthetic import SyntheticTask
from deepgrpo.records import Prompt, Score


class Task(Protocol):
    """Knows whether a completion solves a prompt. `SyntheticTask` also knows the solution and the first error."""

    def verify(self, prompt: Prompt, completion: str) -> Score:
        """Score one response: `completion` is its text without the prompt and without special tokens such as EOS."""
        ...


def build_task(data: DataConfig) -> Task | None:
    """The task behind a data section, or None if the data is a file and brings no verifier.

    Raises ConfigError or MissingExtraError, see `build_gym`.
    """
    if isinstance(data, SyntheticData):
        return SyntheticTask(data)
    if isinstance(data, ReasoningGymData):
        return build_gym(data)
    return None
