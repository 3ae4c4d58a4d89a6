"""The recipe of a run from Python: a recipe in any form, keys to change, and objects that take the place of sections.

    recipe ─► tables ─► overrides ─► [model], [data], [reward], ... name the objects ─► checked ─► sections hold the objects

A resumed run reads its own config.toml, and takes the same objects again: those of the same names and shapes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgrpo.config import (
    Config,
    RewardConfig,
    UserExplore,
    WeightedReward,
    find_recipe,
    given_keywords,
    merge,
    parse_config,
    read_recipe,
    set_values,
    to_tables,
)
from deepgrpo.config.base import GIVEN
from deepgrpo.errors import ConfigError, ModelError
from deepgrpo.prompts.given import first_row
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.moved import load_run_recipe

Recipe = Config | Mapping[str, Any] | str | Path | None
"""A config, its tables as a dict, the name or path of a recipe, or None for the defaults."""

Rewards = Callable[..., Any] | str | Sequence[Callable[..., Any] | str] | None
"""Reward functions, or types of shipped rewards such as "math": one, or several that are added."""

_OF_DATA = ("template", "limit", "max_prompt_tokens", "columns")
_OF_WHOLE = ("truncated_value", "overlong")
_OF_FUNCTION = ("format", "timeout_s")
_CHECKING = ("math", "exact", "task")
_OF_STRATEGY = tuple(name for name in UserExplore.model_fields if name not in ("type", "strategy"))


@dataclass(frozen=True)
class Given:
    """Objects in place of sections of a recipe; None: the recipe's own."""

    model: Any = None
    tokenizer: Any = None
    dataset: Any = None
    eval_dataset: Any = None
    rewards: Rewards = None
    reward_weights: Sequence[float] | None = None
    strategy: Any = None

    @property
    def all_rewards(self) -> list[Callable[..., Any] | str]:
        """The rewards as a list."""
        if self.rewards is None:
            return []
        one = isinstance(self.rewards, str) or not isinstance(self.rewards, Iterable)
        return [self.rewards] if one else list(self.rewards)  # type: ignore[list-item, arg-type]

    @property
    def keywords(self) -> list[str]:
        """Arguments that are objects, in the order of `given_keywords`."""
        found = {
            "model": self.model is not None and not isinstance(self.model, str | Path),
            "dataset": self.dataset is not None,
            "eval_dataset": self.eval_dataset is not None,
            "rewards": any(not isinstance(each, str) for each in self.all_rewards),
            "strategy": self.strategy is not None and not isinstance(self.strategy, str),
        }
        return [keyword for keyword, there in found.items() if there]


def build_config(recipe: Recipe, overrides: Mapping[str, Any] | None, given: Given) -> Config:
    """The recipe of a new run. Raises ConfigError if it is invalid, or an object is not what it should be."""
    given = _complete(given)
    if isinstance(recipe, Config) and not overrides and not given.keywords and given.model is given.strategy is None:
        return recipe
    raw = recipe_tables(recipe)
    set_values(raw, overrides or {})
    if isinstance(given.strategy, str):
        set_values(raw, {"explore.type": given.strategy})
    for name, table in _sections(given, raw).items():
        raw[name] = table
    if given.eval_dataset is not None:
        evaluation = raw.setdefault("eval", {})
        evaluation["data"] = _data(given.eval_dataset, evaluation.get("data") or raw["data"])
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
    for name, table in _sections(given, raw).items():
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


# ---------------------------------------------------------------- sections


def _sections(given: Given, raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sections in which the recipe names the objects; keys of the former section that still apply are kept."""
    found: dict[str, dict[str, Any]] = {}
    if isinstance(given.model, str | Path):
        found["model"] = merge(raw.get("model", {}), {"type": "pretrained", "path": str(given.model)})
    elif given.model is not None:
        found["model"] = _model(given.model, given.tokenizer, raw.get("model", {}))
    if given.dataset is not None:
        found["data"] = _data(given.dataset, raw.get("data", {}))
    if given.rewards is not None:
        found["reward"] = _reward(given.all_rewards, given.reward_weights, raw.get("reward", {}))
    if "strategy" in given.keywords:
        kept = {key: value for key, value in raw.get("explore", {}).items() if key in _OF_STRATEGY}
        found["explore"] = {"type": "user", "strategy": GIVEN + name_of(given.strategy), **kept}
    return found


def _model(model: Any, tokenizer: Any, former: Mapping[str, Any]) -> dict[str, Any]:
    from deepgrpo.model.given import digest_of

    if not hasattr(model, "named_parameters") or not hasattr(tokenizer, "get_vocab"):
        raise ModelError(
            f"model is a {type(model).__name__} and tokenizer a {type(tokenizer).__name__}; pass a causal language model of "
            "transformers and its tokenizer, or the model's name"
        )
    kept = {key: former[key] for key in ("lora",) if key in former}
    return {"type": "given", "name": type(model).__name__, "digest": digest_of(model, tokenizer), **kept}


def _data(dataset: Any, former: Mapping[str, Any]) -> dict[str, Any]:
    """The section of a data set. Where no columns are named: `question`, else `prompt`; `answer` if there is one."""
    row = first_row(dataset)
    table = {"type": "given", **{key: former[key] for key in _OF_DATA if key in former}}
    columns = dict(table.get("columns", {}))
    if "question" not in columns and "question" not in row and "prompt" in row:
        columns["question"] = "prompt"
    if "answer" not in columns and "answer" not in row:
        columns["answer"] = "none"
    return {**table, "columns": columns} if columns else table


def _reward(rewards: Sequence[Any], weights: Sequence[float] | None, former: Mapping[str, Any]) -> dict[str, Any]:
    """The section of one reward, or of several as parts of a weighted one. Success is said by the only part that checks an
    answer, else by the sum.
    """
    if not rewards:
        raise ConfigError("rewards is empty; pass at least one function, or leave it out for the recipe's reward")
    for each in rewards:
        if not callable(each) and not isinstance(each, str):
            raise ConfigError(f"rewards has a {type(each).__name__}; pass functions: def reward(completions, **columns)")
    if weights is not None and len(weights) != len(rewards):
        raise ConfigError(f"reward_weights has {len(weights)} numbers for {len(rewards)} rewards; give one for each")
    whole = {key: former[key] for key in _OF_WHOLE if key in former}
    entries = [
        {"type": each} if isinstance(each, str)
        else {"type": "user", "function": GIVEN + name_of(each), **{key: former[key] for key in _OF_FUNCTION if key in former}}
        for each in rewards
    ]  # fmt: skip
    if len(entries) == 1 and weights is None:
        return {**entries[0], **whole}
    weighed = weights or [1.0] * len(entries)
    parts = {
        name: {**entry, "weight": float(weight)}
        for name, entry, weight in zip(_part_names(rewards), entries, weighed, strict=True)
    }
    checking = sum(entry["type"] in _CHECKING for entry in entries)
    success = former.get("success", None if checking == 1 else "sum")
    return {"type": "weighted", "parts": parts, **({} if success is None else {"success": success}), **whole}


def _part_names(rewards: Sequence[Any]) -> list[str]:
    """A name for each part, by which it is logged: that of its function, made unique."""
    names: list[str] = []
    for each in rewards:
        plain = re.sub(r"[^A-Za-z0-9_-]", "", each if isinstance(each, str) else name_of(each)).lstrip("0123456789_-")
        base = plain or "reward"
        number = sum(name == base or re.fullmatch(rf"{re.escape(base)}_\d+", name) is not None for name in names)
        names.append(f"{base}_{number + 1}" if number else base)
    return names


def name_of(thing: Any) -> str:
    """The name of a function or class, or the class of another object."""
    while hasattr(thing, "func"):  # functools.partial
        thing = thing.func
    return str(getattr(thing, "__name__", type(thing).__name__))


def _require_same(run: Path, section: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError if an object has another name or shape than the one that the run was started with."""
    what = {"reward": "rewards", "explore": "strategy"}.get(section, section)
    before, given = _named_by(saved), _named_by(now)
    if before != given:
        raise ConfigError(
            f"{what}: the run {run} was started with {before}, and {given} is given; pass the same, or begin a new run"
        )
    if saved.get("digest") != now.get("digest"):
        raise ConfigError(
            f"model: the {now['name']} or its tokenizer is not the one that the run {run} was started with: names or shapes of "
            "parameters, tokens or the chat template differ; pass the same ones, or begin a new run"
        )


def _named_by(table: Mapping[str, Any]) -> str:
    """The objects that a section names, in words."""
    if "parts" in table:
        parts = table["parts"].values()
        return " + ".join(f"{float(part.get('weight', 1)):g} · {_named_by(part)}" for part in parts)
    name = next((str(table[key]) for key in ("function", "strategy", "name") if key in table), str(table["type"]))
    return name.removeprefix(GIVEN)


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
