"""`evaluate`: accuracy of a model on questions, from Python objects or by the recipe of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepgrpo.config import Config, GivenModel, set_values
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.errors import ConfigError
from deepgrpo.eval.evaluate import EvalResult
from deepgrpo.eval.evaluate import evaluate as measure
from deepgrpo.eval.model import find_model, load_model
from deepgrpo.explore.environments import build_episodes, tools_of
from deepgrpo.library.given import Recipe, build_config, recipe_tables
from deepgrpo.library.objects import Given, Rewards
from deepgrpo.model.device import resolve_device, use_threads
from deepgrpo.model.given import given_policy, handed_back
from deepgrpo.model.policy import Policy
from deepgrpo.model.soundness import require_rows
from deepgrpo.prompts.source import build_source
from deepgrpo.prompts.tasks import build_task
from deepgrpo.rewards import build_reward
from deepgrpo.runs.saved import SavedRun

DEFAULT_LIMIT = 256
"""Questions of an endless data set."""


def evaluate(
    model: Any, dataset: Any = None, *, tokenizer: Any = None, rewards: Rewards = None,
    reward_weights: Sequence[float] | None = None, config: Recipe = None, overrides: Mapping[str, Any] | None = None,
    samples: int = 0, k: Sequence[int] = (), limit: int | None = None, seed: int = 0, device: str = "auto",
    max_rows: int = 64,
) -> EvalResult:  # fmt: skip
    """Measure a model: one greedy response per question, and `samples` drawn ones for pass@k and maj@k.

    Args:
        model: a model of transformers, a run or its path, a checkpoint, a model directory, or a hub name.
        dataset: a list of dicts, a `datasets.Dataset` or a data frame; default: the held-out data of the recipe.
        tokenizer: of a model that is an object.
        rewards: as for `train`; default: the reward of the recipe.
        reward_weights: as for `train`.
        config: the recipe; default: that of the run that the model comes from.
        overrides: keys to change, as in {"sampling.max_new_tokens": 256}.
        samples: drawn responses per question.
        k: report pass@k and maj@k for these, each at most `samples`.
        limit: number of questions, from the first.
        seed: of the drawn responses.
        device: auto, cpu, cuda, ...
        max_rows: responses decoded at a time.

    Returns:
        figures (`metrics`), one row per question (`rows`), and the cost (`stats`).

    Raises DeepGRPOError: ConfigError if there is no data or no reward, and as `train` does.
    """
    named = isinstance(model, str | Path | SavedRun)
    source = find_model(os.fspath(model)) if named else None
    raw = recipe_tables(config if config is not None else source.run if source else None)
    set_values(raw, overrides or {})
    given = Given(None if named else model, tokenizer, dataset, None, rewards, reward_weights)
    found = build_config(_measured(raw, source.path if source else None, given), None, given)
    where = resolve_device(device, "device")
    how: dict[str, Any] = {"samples": samples, "k": tuple(k), "limit": limit, "seed": seed, "max_rows": max_rows}
    if source is not None:
        return _measure(found, load_model(source, where, found.learner.dtype), **how)
    assert isinstance(found.model, GivenModel)
    with handed_back(model):
        return _measure(found, given_policy(found.model, device=where, dtype=found.learner.dtype), **how)


def _measured(raw: dict[str, Any], path: str | None, given: Given) -> dict[str, Any]:
    """The tables of a recipe whose data and reward are those to measure with.

    Args:
        path: of the model; None: it is given.

    Raises ConfigError if there is no data or no reward.
    """
    held_out = raw.get("eval", {})
    found = {key: table for key, table in raw.items() if key in ("sampling", "learner", "explore", "data", "env", "reward")}
    if given.dataset is None and held_out.get("data"):
        found["data"] = held_out["data"]
    if given.rewards is None and held_out.get("reward"):
        found["reward"] = held_out["reward"]
    if given.dataset is None and "data" not in found:
        raise ConfigError("dataset is missing, and no recipe names data; pass a list of dicts, or config=...")
    if given.rewards is None and "reward" not in found:
        raise ConfigError("rewards is missing, and no recipe has a reward; pass functions, or config with a table reward")
    return found if path is None else {**found, "model": {"type": "pretrained", "path": path}}


def _measure(
    config: Config, policy: Policy, *, samples: int, k: Sequence[int], limit: int | None, seed: int, max_rows: int
) -> EvalResult:
    use_threads(policy.model, config.run.threads)
    context = min(config.sampling.max_total_tokens or policy.context, policy.context)
    sampling = config.sampling.model_copy(update={"max_total_tokens": context})
    episodes = build_episodes(config.env, config.data, policy)
    source = build_source(
        config.data, policy.tokenizer, seed=seed, context=context, shuffle=False, tools=tools_of(episodes)
    )
    number = (source.size or DEFAULT_LIMIT) if limit is None else limit
    prompts = source.head(number)
    require_rows(policy, lambda: prompts)
    reward = build_reward(config.reward, build_task(config.data))
    engine = EmbeddedEngine.for_evaluation(policy, max_rows)
    try:
        return measure(
            engine, reward, prompts, policy.tokenizer, sampling=sampling, samples=samples, k=k,
            truncated_value=config.reward.truncated_value, seed=seed, success_threshold=config.explore.success_threshold,
            chunk=4 * max_rows, episodes=episodes,
        )  # fmt: skip
    finally:
        if episodes is not None:
            episodes.close()
        engine.close()
        reward.close()
