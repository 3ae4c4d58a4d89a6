"""Questions of a run: the curriculum, the steps of its epochs, the held-out ones, and the rows left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepgrpo.config import Config, EvalConfig, MixData, RewardConfig
from deepgrpo.errors import ConfigError
from deepgrpo.prompts.chat import Tools
from deepgrpo.prompts.curriculum import Curriculum
from deepgrpo.prompts.loaded import LoadedSource
from deepgrpo.prompts.source import PromptSource, build_source
from deepgrpo.prompts.tasks import build_task
from deepgrpo.records import Prompt
from deepgrpo.rewards import build_reward
from deepgrpo.rewards.base import Reward


def with_steps(config: Config, source: PromptSource) -> Config:
    """The recipe with `run.steps` set to the steps that `run.epochs` take at most, if it was left out. Raises ConfigError."""
    wanted = config.run
    if wanted.epochs is None or "steps" in wanted.model_fields_set:
        return config
    if source.size is None:
        raise ConfigError(
            f"run.epochs is {wanted.epochs}, but it is not known how many rows the data has; set run.steps, too: the run ends "
            "by what comes first"
        )
    steps = -(-wanted.epochs * source.size // wanted.prompts_per_step)
    return config.model_copy(update={"run": wanted.model_copy(update={"steps": steps})})


def build_curriculum(config: Config, source: PromptSource) -> Curriculum | None:
    """The curriculum of a recipe, None if all prompts are taken in turn. Raises ConfigError: the source has no numbers."""
    data = config.data
    if isinstance(data, MixData) or data.sampling == "uniform":
        return None
    if not isinstance(source, LoadedSource):
        raise ConfigError(
            f'data.sampling is "{data.sampling}", but the rows are read when their turn comes; set data.streaming = false to '
            'hold them in memory, or data.sampling = "uniform"'
        )
    return Curriculum(source, data.sampling, data.curriculum, config.run.seed)


def held_out(
    config: EvalConfig, training: RewardConfig, tokenizer: Any, *, seed: int, context: int, tools: Tools = None
) -> tuple[Sequence[Prompt], Reward | None, PromptSource | None]:
    """Return the held-out prompts, their reward (None: that of the training is used), and their source.

    Args:
        training: section of the training reward, which is the default.
        context: longest prompt plus response, in tokens.
        tools: schemas of the environment's tools.
    """
    if config.data is None or not config.scheduled:
        return (), None, None
    source = build_source(config.data, tokenizer, seed=seed, context=context, shuffle=False, name="eval.data", tools=tools)
    chosen = config.reward or training
    shared = config.reward is None and not chosen.uses_task
    reward = None if shared else build_reward(chosen, build_task(config.data))
    return source.head(config.limit), reward, source


def skipped_lines(source: PromptSource, held_out: PromptSource | None) -> list[str]:
    """Skipped rows of the training and the held-out data, one line each."""
    lines = []
    for of, each in (("", source), (" of eval.data", held_out)):
        if each is not None and each.skipped:
            lines.append(f"rows{of} skipped: " + ", ".join(f"{count} {reason}" for reason, count in each.skipped.items()))
    return lines
