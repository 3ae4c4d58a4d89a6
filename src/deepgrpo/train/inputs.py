"""Inputs of a run, built and checked without weights, alike for training and a dry run: prompts, environment, strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepgrpo.config import Config
from deepgrpo.explore import build_strategy
from deepgrpo.explore.base import Context, Limits, Strategy
from deepgrpo.explore.environments import build_episodes, tools_of
from deepgrpo.explore.episodes import Episodes
from deepgrpo.model.policy import Policy
from deepgrpo.model.soundness import require_rows
from deepgrpo.prompts.curriculum import Curriculum
from deepgrpo.prompts.source import PromptSource, build_source
from deepgrpo.prompts.tasks import Task, build_task
from deepgrpo.records import Prompt
from deepgrpo.rewards.base import Reward
from deepgrpo.train.build import response_limits
from deepgrpo.train.critique import Critic, build_critic
from deepgrpo.train.questions import build_curriculum, held_out, with_steps
from deepgrpo.train.signals import check_signals
from deepgrpo.train.user_loss import build_loss


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs of a run."""

    config: Config
    """The recipe, with `run.steps` filled in."""
    limits: Limits
    episodes: Episodes | None
    source: PromptSource
    curriculum: Curriculum | None
    task: Task | None
    eval_prompts: Sequence[Prompt]
    eval_reward: Reward | None
    """None: the reward of the training."""
    eval_source: PromptSource | None
    strategy: Strategy
    critic: Critic
    """Without an engine."""


def build_inputs(config: Config, policy: Policy) -> Inputs:
    """Build the inputs of a run, and refuse what its first step would refuse.

    Args:
        policy: with or without weights.

    Raises ConfigError, DataError or ModelError.
    """
    limits = response_limits(config.sampling, policy.context)
    episodes = build_episodes(config.env, config.data, policy)
    tools, seed, context = tools_of(episodes), config.run.seed, limits.max_total_tokens
    source = build_source(config.data, policy.tokenizer, seed=seed, context=context, tools=tools)
    config = with_steps(config, source)
    curriculum = build_curriculum(config, source)
    task = build_task(config.data)
    eval_prompts, eval_reward, eval_source = held_out(
        config.eval, config.reward, policy.tokenizer, seed=seed, context=context, tools=tools
    )
    require_rows(policy, source.known)
    require_rows(policy, lambda: eval_prompts, "eval.data")
    strategy = build_strategy(config.explore, Context(config.credit.scale, policy.tokenizer, task))
    critic = build_critic(config, policy, limits)
    check_signals(policy, strategy, critic)
    build_loss(config.loss)  # refuses a user's loss that cannot be trained on
    return Inputs(
        config, limits, episodes, source, curriculum, task, eval_prompts, eval_reward, eval_source, strategy, critic
    )
