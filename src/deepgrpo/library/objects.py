"""Objects of a Python program in place of sections of a recipe, and the sections that name them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgrpo.config import UserExplore, merge
from deepgrpo.config.base import GIVEN
from deepgrpo.errors import ConfigError, ModelError
from deepgrpo.prompts.given import first_row

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


def sections(given: Given, raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sections in which the recipe names the objects; keys of the former section that still apply are kept."""
    found: dict[str, dict[str, Any]] = {}
    if isinstance(given.model, str | Path):
        found["model"] = merge(raw.get("model", {}), {"type": "pretrained", "path": str(given.model)})
    elif given.model is not None:
        found["model"] = _model(given.model, given.tokenizer, raw.get("model", {}))
    if given.dataset is not None:
        found["data"] = data_section(given.dataset, raw.get("data", {}))
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


def data_section(dataset: Any, former: Mapping[str, Any]) -> dict[str, Any]:
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


def named_by(table: Mapping[str, Any]) -> str:
    """The objects that a section names, in words."""
    if "parts" in table:
        parts = table["parts"].values()
        return " + ".join(f"{float(part.get('weight', 1)):g} · {named_by(part)}" for part in parts)
    name = next((str(table[key]) for key in ("function", "strategy", "name") if key in table), str(table["type"]))
    return name.removeprefix(GIVEN)
