"""The verifier that belongs to the task."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from deepgrpo.config import TaskReward
from deepgrpo.records import Prompt, Score
from deepgrpo.rewards.base import Verifier

_log = logging.getLogger(__name__)


class TaskVerifierReward:
    """Asks the task. Scores below `threshold` count as 0, others stay as they are.

    Example: with threshold 1.0, reasoning-gym's partial credit of 0.1 becomes 0; with 0.05 it stays 0.1.
    """

    def __init__(self, config: TaskReward, task: Verifier) -> None:
        self._threshold = config.threshold
        self._task = task

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        """A verifier that raises costs that sample a zero with the problem "raised", and a line in the log."""
        return [self._one(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    def close(self) -> None:
        pass

    def _one(self, prompt: Prompt, completion: str) -> Score:
        try:
            score = self._task.verify(prompt, completion)
        except Exception as error:
            _log.warning("the verifier raised on prompt %r: %r", prompt.id, error)
            return Score(0.0, problem="raised")
        return score if score.value >= self._threshold else replace(score, value=0.0)
