"""The recipe of a run from Python: a recipe in any form, keys to change, and objects that take the place of sections.

    recipe ─► tables ─► overrides ─► [model], [data], [reward], ... name the objects ─► checked ─► sections hold the objects

A resumed run reads its own config.toml, and takes the same objects again: those of the same names and shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepgrpo.config import (
    Config,
    RewardConfig,
    WeightedReward,
    find_recipe,
    given_keywords,
    merge,
    parse_config,
    read_recipe,
    set_values,
    to_tables,
)
from deepgrpo.errors import ConfigError
from deepgrpo.library.objects import Given, data_section, named_by, sections
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.moved import load_run_recipe

Recipe = Config | Mapping[str, Any] | str | Path | None
"""A config, its tables as a dict, the name or path of a recipe, or None for the defaults."""

def build_config(recipe: Recipe, overrides: Mapping[str, Any] | None, given: Given) -> Config:
    """The recipe of a new run. Raises ConfigError if it is invalid, or an object is not what it should be."""
    given = _complete(given)
    if isinstance(recipe, Config) and not overrides and not given.keywords and given.model is given.strategy is None:
        return recipe
    raw = recipe_tables(recipe)
    set_values(raw, overrides or {})
    if isinstance(given.strategy, str):
        set_values(raw, {"explore.type": given.strategy})
    for name, table in sections(given, raw).items():
        raw[name] = table
    if given.eval_dataset is not None:
        evaluation = raw.setdefault("eval", {})
        evaluation["data"] = data_section(given.eval_dataset, evaluation.get("data") or raw["data"])
        if "every" not in evaluation and "every_tokens" not in evaluation:  # before the first and after the last step
            evaluation["every"] = max(1, raw.get("run", {}).get("steps", 100))
    config = parse_config(raw, source=f"recipe {str(recipe)!r}" if isinstance(recipe, str | Path) else "the config")
    return _holding(_refuse_travel(config), given)


def resumed_config(run: Path, overrides: Mapping[str, Any] | None, given: Given) -> Config:
    """The recipe of a run that goes on. Raises ConfigError if it was started with other objects than those given."""
    paths = RunDir(run)
    if not paths.has_recipe():
        raise ConfigError(f"resume is {str(run)!r}, which has no config.toml; name the directory of an earlier run")
    given = _complete(given)
    saved = load_run_recipe(paths)
    raw, wanted = to_tables(saved), given_keywords(saved)
    set_values(raw, overrides or {})
    config = parse_config(raw, str(paths.config))
    again = ", ".join(f"{each}=..." for each in wanted)
    for keyword in wanted:
        if keyword not in given.keywords:
            raise ConfigError(
                f"{keyword} is missing: the run {run} was started with objects; give the same again: "
                f'train(resume="{run}", {again})'
            )
    for keyword in given.keywords:
        if keyword not in wanted:
            raise ConfigError(
                f"{keyword} is given, but the run {run} was started without it and has that section in its config.toml; "
                "leave it out, or begin a new run"
            )
    if isinstance(given.model, str | Path) or isinstance(given.strategy, str):
        raise ConfigError("model and strategy by name are for a new run; change a resumed one by overrides={...}")
    for name, table in sections(given, raw).items():
        _require_same(run, name, raw[name], table)
    return _holding(_refuse_travel(config), given)


def recipe_tables(recipe: Recipe) -> dict[str, Any]:
    """A recipe in any form as tables, unchecked. Raises ConfigError if it is in none, or a file cannot be read."""
    if recipe is None:
        return {}
    if isinstance(recipe, Config):
        return to_tables(recipe)
    if isinstance(recipe, Mapping):
        raw = copy.deepcopy(dict(recipe))
        base = raw.pop("base", None)
        return raw if base is None else merge(read_recipe(find_recipe(str(base))), raw)
    if isinstance(recipe, str | Path):
        return read_recipe(find_recipe(str(recipe)))
    raise ConfigError(
        f"config is a {type(recipe).__name__}; pass a Config, a dict of its tables, or the name or path of a recipe"
    )


def _complete(given: Given) -> Given:
    """Load the tokenizer that belongs to a model, if only the model was given."""
    if given.tokenizer is not None and "model" not in given.keywords:
        raise ConfigError("tokenizer is given without a model; a model of the recipe brings its own: set model.tokenizer there")
    if given.reward_weights is not None and given.rewards is None:
        raise ConfigError("reward_weights is given without rewards")
    if "model" not in given.keywords or given.tokenizer is not None:
        return given
    name = getattr(getattr(given.model, "config", None), "_name_or_path", "")
    if not name:
        raise ConfigError("model is given without its tokenizer; pass tokenizer=..., as it was not loaded from a known place")
    from deepgrpo.config import PretrainedModel
    from deepgrpo.model.loading import load_tokenizer

    return Given(**{**vars(given), "tokenizer": load_tokenizer(PretrainedModel(path=name))})


def _require_same(run: Path, section: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError if an object has another name or shape than the one that the run was started with."""
    what = {"reward": "rewards", "explore": "strategy"}.get(section, section)
    before, given = named_by(saved), named_by(now)
    if before != given:
        raise ConfigError(
            f"{what}: the run {run} was started with {before}, and {given} is given; pass the same, or begin a new run"
        )
    if saved.get("digest") != now.get("digest"):
        raise ConfigError(
            f"model: the {now['name']} or its tokenizer is not the one that the run {run} was started with: names or shapes of "
            "parameters, tokens or the chat template differ; pass the same ones, or begin a new run"
        )


def _refuse_travel(config: Config) -> Config:
    """Raise ConfigError for an object that cannot reach the processes of a cluster."""
    if config.cluster is not None and config.model.type == "given":
        raise ConfigError(
            "model is an object of this process, and the workers of [cluster] load theirs: save it with "
            'model.save_pretrained(DIR) and tokenizer.save_pretrained(DIR), and pass model="DIR"'
        )
    return config


def _holding(config: Config, given: Given) -> Config:
    """The config whose sections hold the objects."""
    changes: dict[str, Any] = {}
    if "model" in given.keywords:
        changes["model"] = config.model.holding((given.model, given.tokenizer))
    if given.dataset is not None:
        changes["data"] = config.data.holding(given.dataset)
    if given.eval_dataset is not None:
        assert config.eval.data is not None
        changes["eval"] = config.eval.model_copy(update={"data": config.eval.data.holding(given.eval_dataset)})
    if "rewards" in given.keywords:
        changes["reward"] = _reward_holding(config.reward, given.all_rewards)
    if "strategy" in given.keywords:
        changes["explore"] = config.explore.holding(given.strategy)
    return config.model_copy(update=changes)


def _reward_holding(reward: RewardConfig, rewards: Sequence[Any]) -> RewardConfig:
    if not isinstance(reward, WeightedReward):
        return reward.holding(rewards[0])
    parts = {
        name: part if isinstance(each, str) else part.holding(each)
        for (name, part), each in zip(reward.parts.items(), rewards, strict=True)
    }
    return reward.model_copy(update={"parts": parts})
