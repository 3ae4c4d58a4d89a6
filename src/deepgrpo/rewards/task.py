"""Reward by the task's own verifier."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from deepgrpo.config import TaskKeys
from deepgrpo.errors import ConfigError
from deepgrpo.feedback import Score
from deepgrpo.records import Prompt
from deepgrpo.rewards.base import RemoteVerifier, Verifier, Voting, answer_part
from deepgrpo.rewards.vote import loose_answer

_log = logging.getLogger(__name__)


class TaskVerifierReward:
    """Score of the task's verifier; scores below `threshold` count as 0, others are unchanged.

    The synthetic task verifies in this process. reasoning-gym's verifiers may hang, so they run in worker processes
    (`rewards.workers`) with `timeout_s` seconds per response.

    Example: with threshold 1.0, reasoning-gym's partial credit of 0.1 becomes 0; with 0.05 it stays 0.1.
    """

    def __init__(self, config: TaskKeys, task: Verifier) -> None:
        self._threshold = config.threshold
        self._tags = config.reasoning_tags
        self._task = task
        self._remote: RemoteVerifier | None = None
        if isinstance(task, RemoteVerifier):
            from deepgrpo.rewards.workers import Workers  # needs pebble: imported only for remote verifiers

            self._remote = task
            self._workers = Workers(
                'reward.type = "task"', task.preparation(), "reasoning_gym",
                count=config.workers, timeout_s=config.timeout_s,
            )  # fmt: skip

    @classmethod
    def build(cls, config: TaskKeys, task: Verifier | None) -> TaskVerifierReward:
        if task is None:
            raise ConfigError(
                'reward.type is "task", but the data brings no verifier; choose reward.type = "math", "exact" or '
                '"user", or data.type = "synthetic" or "reasoning_gym"'
            )
        return cls(config, task)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        """See `Reward.score`. A verifier that raises, hangs or returns no finite number scores 0 with a problem.

        Raises RewardError if the workers of a remote verifier cannot be started.
        """
        pairs = [(prompt, answer_part(prompt, text, self._tags)) for prompt, text in zip(prompts, completions, strict=True)]
        if self._remote is None:
            scores = [self._one(prompt, text) for prompt, text in pairs]
        else:
            checks = [self._remote.check(prompt, text) for prompt, text in pairs]
            found = iter(self._workers.run([check for check in checks if check is not None]))
            scores = [Score(0.0, parsed=False) if check is None else next(found) for check in checks]
        return [score if score.value >= self._threshold else replace(score, value=0.0) for score in scores]

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """The task's vote if it has one, else `loose_answer`."""
        completion = answer_part(prompt, completion, self._tags)
        return self._task.vote(prompt, completion) if isinstance(self._task, Voting) else loose_answer(completion)

    def close(self) -> None:
        if self._remote is not None:
            self._workers.close()

    def _one(self, prompt: Prompt, completion: str) -> Score:
        try:
            score = self._task.verify(prompt, completion)
        except Exception as error:
            _log.warning("the verifier raised on prompt %r: %r", prompt.id, error)
            return Score(0.0, problem="raised")
        return score if math.isfinite(score.value) else Score(0.0, problem="not finite")
