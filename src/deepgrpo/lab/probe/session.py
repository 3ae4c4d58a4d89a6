"""Everything that a probe needs once: the policy with its weights, prompts, engine, and the parts of each strategy.

Nothing is written. A run that trains meanwhile may delete the checkpoint that is being read; then the next newest is read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from deepgrpo.config import Config, template_of, with_template
from deepgrpo.engines.base import SamplingParams
from deepgrpo.errors import CheckpointError, ModelError, first_line
from deepgrpo.eval.model import ModelSource, model_section
from deepgrpo.explore import build_strategy
from deepgrpo.explore.base import Context, Limits, Signals, State, Strategy
from deepgrpo.explore.environments import build_episodes, tools_of
from deepgrpo.explore.episodes import Episodes
from deepgrpo.explore.grow import Judge
from deepgrpo.lab.probe.arms import Arm
from deepgrpo.lab.probe.remember import RememberingEngine
from deepgrpo.lab.probe.setting import Setting, checkpoint_of
from deepgrpo.model.adapters import has_adapters
from deepgrpo.model.device import resolve_device, use_threads
from deepgrpo.model.policy import Policy, Reference
from deepgrpo.model.soundness import require_rows
from deepgrpo.prompts.source import Cursor, PromptSource, build_source
from deepgrpo.prompts.tasks import build_task
from deepgrpo.rewards import build_reward
from deepgrpo.rewards.base import Reward, judge
from deepgrpo.rewards.overlong import OverlongPenalty
from deepgrpo.runs.checkpoints import Checkpoint, TrainState, unreadable
from deepgrpo.runs.moved import load_run_recipe
from deepgrpo.runs.weights import check_weights
from deepgrpo.threads import Threads
from deepgrpo.train.build import build_policy, build_sampler, response_limits
from deepgrpo.train.critique import build_critic
from deepgrpo.train.dynamic import Takes
from deepgrpo.train.objective import Objective, build_objective
from deepgrpo.train.questions import build_curriculum
from deepgrpo.train.signals import build_signals
from deepgrpo.train.start import load_start, rebuild_start
from deepgrpo.train.warmstart import load_from

ATTEMPTS = 3
"""Checkpoints that may vanish while they are read."""


@dataclass
class ArmParts:
    """A strategy as it samples and learns."""

    arm: Arm
    strategy: Strategy
    state: State
    saved: bool
    """The state is that of the run."""
    objective: Objective
    judge: Judge
    params: SamplingParams
    signals: Signals | None


@dataclass
class Session:
    """The open parts of a probe; the caller closes them."""

    policy: Policy
    start: Reference | None
    """Start model of the KL term."""
    threads: Threads
    source: PromptSource
    prompts: Takes
    """The source, or what the curriculum of the run draws next."""
    cursor: Cursor
    state: TrainState | None
    """State of the checkpoint that is probed."""
    run_config: Config | None
    """Recipe of the run, without the changes of the command line."""
    limits: Limits
    engine: RememberingEngine
    task: Any
    rewards: dict[str, Reward] = field(default_factory=dict)
    """Section → its reward."""
    weights: str = ""
    """Place of the weights, for the headline."""
    episodes: Episodes | None = None
    """Plays episodes with the environment of the recipe."""

    def parts_of(self, arm: Arm) -> ArmParts:
        """Build a strategy with its reward, loss and state.

        Raises ConfigError, StrategyError, ModelError: it cannot be used with this model; CheckpointError: the run's state does
        not fit it.
        """
        config = arm.config
        strategy = build_strategy(config.explore, Context(config.credit.scale, self.policy.tokenizer, self.task))
        exact = self.engine.exact and config.sampling.of_the_policy
        overlong = config.reward.overlong
        limits = self.limits
        penalty = None if overlong is None else OverlongPenalty(overlong, limits.max_new_tokens, limits.max_total_tokens)
        critic = replace(build_critic(config, self.policy, limits), engine=self.engine)
        key = config.reward.model_dump_json()
        if key not in self.rewards:
            self.rewards[key] = build_reward(config.reward, self.task if config.reward.uses_task else None)
        return ArmParts(
            arm, strategy, *self._state_of(config, strategy), build_objective(config, exact_sampler=exact),
            functools.partial(judge, self.rewards[key], config.reward.truncated_value, penalty=penalty),
            SamplingParams.of(config.sampling),
            build_signals(self.policy, strategy, config.learner.tokens_per_pack, critic),
        )  # fmt: skip

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.policy.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _state_of(self, config: Config, strategy: Strategy) -> tuple[State, bool]:
        """State of the checkpoint for a strategy of the run's kind, else the initial one; and True for the former."""
        if self.state is None or self.run_config is None or not self.state.strategy:
            return strategy.initial_state(), False
        own: Any = self.run_config.explore
        if own.type != config.explore.type or getattr(own, "strategy", None) != getattr(config.explore, "strategy", None):
            return strategy.initial_state(), False
        try:
            strategy.report(self.state.strategy)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the state of the strategy in the checkpoint of step {self.state.step} does not fit the recipe "
                f"({type(error).__name__}: {first_line(error)}); undo the changes to [explore], or probe another --step"
            ) from error
        return self.state.strategy, True

    def close(self) -> None:
        self.engine.close()
        for reward in self.rewards.values():
            reward.close()
        if self.episodes is not None:
            self.episodes.close()


def open_session(setting: Setting, betas: bool) -> Session:
    """Load the weights and build what all strategies share.

    Args:
        betas: some strategy's loss has a KL term, so the start model is needed too.

    Raises ConfigError, DataError, ModelError, CheckpointError.
    """
    config = setting.config
    device = resolve_device(config.run.device)
    use_threads(None, config.run.threads)
    torch.manual_seed(config.run.seed)  # new adapters draw from the global stream
    policy, start, state, weights = _weights(setting, device, betas)
    threads = use_threads(policy.model, config.run.threads)
    limits = response_limits(config.sampling, policy.context)
    data = config.data
    if setting.chat is not None:
        has_one = bool(getattr(policy.tokenizer, "chat_template", None))
        on = setting.chat == "on" or (setting.chat == "auto" and template_of(data).chat is not False and has_one)
        data = with_template(data, chat=on)
    episodes = build_episodes(config.env, data, policy)
    source = build_source(
        data, policy.tokenizer, seed=config.run.seed, context=limits.max_total_tokens, tools=tools_of(episodes)
    )
    require_rows(policy, source.known)
    engine = RememberingEngine(build_sampler(config, policy))
    run_config = load_run_recipe(setting.run) if setting.run is not None and setting.run.has_recipe() else None
    cursor = Cursor.from_dict(state.cursor) if state is not None and state.cursor else Cursor()
    curriculum = build_curriculum(config.model_copy(update={"data": data}), source)
    prompts: Takes = source
    if curriculum is not None:
        known = state or TrainState()
        prompts = curriculum.draw(known.curriculum, known.step + 1, cursor)
    return Session(
        policy, start, threads, source, prompts, cursor, state, run_config, limits, engine, build_task(data), weights=weights,
        episodes=episodes,
    )


def _weights(
    setting: Setting, device: str, betas: bool
) -> tuple[Policy, Reference | None, TrainState | None, str]:  # fmt: skip
    """The policy, the start model of the KL term, the state of the checkpoint, and the place of the weights."""
    for attempt in range(ATTEMPTS):
        checkpoint = checkpoint_of(setting)
        try:
            if checkpoint is not None:
                return _of_checkpoint(setting, checkpoint, device, betas)
            break
        except (OSError, SafetensorError, CheckpointError, ModelError):
            gone = checkpoint is not None and not checkpoint.path.exists()
            if not gone or setting.step is not None or attempt == ATTEMPTS - 1:
                raise
    config, run = setting.config, setting.run
    policy = build_policy(config, device)
    place = str(getattr(config.model, "path", "a model from scratch"))
    if run is not None:
        check_weights(run.start)
        load_start(policy, run)
        place = str(run.start)
    elif config.warmstart is not None and config.warmstart.from_ is not None:
        load_from(policy, Path(config.warmstart.from_))
        place = config.warmstart.from_
    return policy, Reference.of(policy) if betas else None, None, place


def _of_checkpoint(
    setting: Setting, checkpoint: Checkpoint, device: str, betas: bool
) -> tuple[Policy, Reference | None, TrainState | None, str]:  # fmt: skip
    config, run = setting.config, setting.run
    assert run is not None
    state = checkpoint.verify(below="model/")
    place = str(checkpoint.model)
    if not betas and not (checkpoint.model / "adapter_config.json").is_file():
        # straight from the checkpoint: the model that the recipe starts from is not needed
        section = model_section(ModelSource(place, config))
        return build_policy(config.model_copy(update={"model": section}), device), None, state, place
    policy = build_policy(config, device)
    if betas or has_adapters(policy.model):
        kept = config.model_copy(update={"loss": config.loss.model_copy(update={"beta": 1.0 if betas else 0.0})})
        rebuild_start(policy, state.start_weights, kept, run)
    start = Reference.of(policy) if betas else None
    try:
        policy.load_weights(checkpoint.model)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise unreadable(checkpoint, error) from error
    return policy, start, state, place

