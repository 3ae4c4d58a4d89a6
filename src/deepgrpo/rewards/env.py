"""Rewards that the environment gave, added over the turns of an episode."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deepgrpo.config.scorers import EnvKeys
from deepgrpo.feedback import Score
from deepgrpo.records import Prompt
from deepgrpo.rewards.base import Verifier

_LARGEST = 3.4e38
"""The learner computes in float32, which ends there."""


class EnvironmentReward:
    """Sum of `turn_rewards`, which growth adds to the columns of an episode's prompt."""

    @classmethod
    def build(cls, config: EnvKeys, task: Verifier | None) -> EnvironmentReward:
        return cls()

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        """See `Reward.score`."""
        return [_sum(prompt.columns["turn_rewards"]) for prompt in prompts]

    def close(self) -> None:
        """See `Reward.close`."""


def _sum(rewards: Sequence[float]) -> Score:
    total = math.fsum(rewards) if all(map(math.isfinite, rewards)) else math.nan
    return Score(total) if abs(total) <= _LARGEST else Score(0.0, problem="not finite")
