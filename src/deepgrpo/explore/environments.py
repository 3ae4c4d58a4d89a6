"""The episodes of a recipe: its environment, and how the chat template shows what it replies."""

from __future__ import annotations

from deepgrpo.config import DataConfig, EnvConfig, GeneratedData, MixData
from deepgrpo.envs import build_environment
from deepgrpo.errors import ConfigError
from deepgrpo.explore.episodes import Episodes
from deepgrpo.model.policy import Policy
from deepgrpo.prompts.between import Between
from deepgrpo.prompts.chat import Tools, build_renderer


def build_episodes(env: EnvConfig | None, data: DataConfig, policy: Policy) -> Episodes | None:
    """Build the episodes of a recipe; None without an environment. The caller closes `environment`.

    Raises ConfigError or ModelError: the environment cannot be built, or the template cannot show its observations.
    """
    if env is None:
        return None
    sections = [each.data for each in data.sources] if isinstance(data, MixData) else [data]
    template = sections[0].template
    if any(each.template != template for each in sections):
        raise ConfigError(
            "data.sources have different templates, and an environment replies in one; give all sources the same template"
        )
    tokenizer = policy.tokenizer
    environment = build_environment(env, tokenizer)
    try:
        generated = all(isinstance(each, GeneratedData) for each in sections)
        renderer = build_renderer(template, tokenizer, plain_if_no_template=generated)
        between = Between(tokenizer, environment.role, renderer.chat, policy.eos_ids, template.chat_template_kwargs)
        between.encode("", ended=True)  # refuses a template that shows no observations
    except BaseException:
        environment.close()
        raise
    return Episodes(
        environment, lambda text, ended: between.encode(text, ended=ended), tokenizer.decode, frozenset(policy.eos_ids),
        env.max_turns, env.max_turn_tokens,
    )  # fmt: skip


def tools_of(episodes: Episodes | None) -> Tools:
    """Schemas of the environment's tools, for the prompts; None without any."""
    return episodes.environment.tools() if episodes is not None else None
