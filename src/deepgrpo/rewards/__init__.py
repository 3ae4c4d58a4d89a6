"""Rewards: scores for responses, by comparison with a reference, by the task's verifier, by a user's function or by a judge."""

from __future__ import annotations

from importlib import import_module

from deepgrpo.config import PartConfig, RewardConfig
from deepgrpo.rewards.base import Reward, Verifier

_REWARDS = {
    "math": "math_answer:MathAnswerReward",
    "exact": "exact:ExactMatchReward",
    "task": "task:TaskVerifierReward",
    "user": "user:UserFunctionReward",
    "env": "env:EnvironmentReward",
    "judge": "judge:JudgeReward",
    "weighted": "parts:WeightedReward",
}
"""`reward.type` → module and class in this package; the class has `build(config, task)`.

Modules load when chosen: a user's function needs neither pebble nor math-verify.
"""


def build_reward(config: RewardConfig | PartConfig, task: Verifier | None = None) -> Reward:
    """Build the reward of a recipe.

    Args:
        config: the section `reward`, or the table of a part; its type chooses the class.
        task: the verifier of the data section (`prompts.tasks.build_task`), if it has one.

    Raises ConfigError: `reward.type` is "task" and there is no verifier, or a user's function cannot be loaded.
    """
    module, name = _REWARDS[config.type].split(":")
    reward: Reward = getattr(import_module(f"deepgrpo.rewards.{module}"), name).build(config, task)
    return reward
