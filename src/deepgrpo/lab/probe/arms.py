"""The strategies that a probe compares: each a recipe that differs from the probed one in how it explores and trains.

    root   deep:gamma=0   "root:num_rollouts=22"   deep:loss.lambda=0.5      --strategies
    the arms of an experiment file                                             --arms
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepgrpo.config import Config, ExploreConfig, RootExplore, merge, parse_config
from deepgrpo.config.base import tables_of
from deepgrpo.config.explain import section_names
from deepgrpo.config.files import override
from deepgrpo.errors import ConfigError, did_you_mean
from deepgrpo.lab.compare.experiment import find_experiment, load_experiment

DEFAULTS = ("root", "deep", "random")
_OWN = ("explore", "credit", "loss", "sampling", "reward", "run", "optim", "learner")
"""Sections in which arms may differ."""
_GRADIENT = ("explore", "credit", "loss", "sampling", "reward")
"""Sections that decide the gradient of a step."""


@dataclass(frozen=True)
class Arm:
    """One strategy to measure. Example: Arm("deep:gamma=0", Config(...))."""

    name: str
    config: Config

    @property
    def step_prompts(self) -> int:
        return self.config.run.prompts_per_step


@dataclass(frozen=True)
class Arms:
    """All strategies of a probe, each with a gradient of its own."""

    measured: tuple[Arm, ...]
    twins: Mapping[str, str]
    """Arm that is not measured → the arm with the same gradient."""


def arms_of(base: Config, strategies: Sequence[str], experiment: str | None) -> Arms:
    """The strategies asked for; without any, the recipe's own, root, deep and random.

    Raises ConfigError for an unknown strategy, key or arm, and for an arm on other data.
    """
    raw = base.model_dump(mode="json")
    if experiment is not None:
        found = _of_experiment(raw, experiment, strategies)
    else:
        own = base.explore.type
        names = list(strategies) or [*DEFAULTS, *([own] if own not in DEFAULTS else [])]
        found = [Arm(name, _changed(raw, name)) for name in names]
    twins: dict[str, str] = {}
    measured: list[Arm] = []
    for arm in found:
        if any(arm.name == other.name for other in found if other is not arm):
            raise ConfigError(f"--strategies names {arm.name!r} twice; name each strategy once")
        same = next((other.name for other in measured if _gradient(other.config) == _gradient(arm.config)), None)
        if same is None:
            measured.append(arm)
        else:
            twins[arm.name] = same
    return Arms(tuple(measured), twins)


def reference_arm(base: Config, rollouts: int | None) -> Arm:
    """Rollouts from the prompt alone, with the recipe's reward and loss: its mean gradient is the true one.

    Args:
        rollouts: per prompt; None: as many as the recipe's strategy takes from the prompt, else 8.
    """
    own: Any = base.explore
    count = rollouts or (own.num_rollouts if "num_rollouts" in type(own).model_fields else 8)
    return Arm("reference", base.model_copy(update={"explore": RootExplore(num_rollouts=max(2, count))}))


def _changed(raw: Mapping[str, Any], spec: str) -> Config:
    """The recipe with the strategy and keys of `TYPE:key=value,key=value`."""
    kind, _, rest = spec.partition(":")
    known = [section.model_fields["type"].default for section in tables_of(ExploreConfig)]
    if kind not in known:
        hint = did_you_mean(kind, known, "the strategies are")
        raise ConfigError(f"--strategies names {kind!r}, which is no strategy; {hint}")
    changes = [("explore.type", kind)]
    for part in re.split(r",(?=[\w.]+=)", rest) if rest else []:
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"--strategies has {spec!r}, where {part!r} has no value; write TYPE:key=value,key=value")
        of_recipe = key.split(".")[0] in section_names()
        if of_recipe and key.split(".")[0] not in _OWN:
            raise ConfigError(
                f"--strategies has {spec!r}, but strategies are compared on the same model and data; leave {key} out, or set "
                f"it for all with --{key} {value}"
            )
        changes.append((key if of_recipe else f"explore.{key}", value))
    own = merge({}, raw)
    override(own, changes)
    return parse_config(own, source=f"--strategies {spec}")


def _of_experiment(raw: Mapping[str, Any], name: str, wanted: Sequence[str]) -> list[Arm]:
    path = find_experiment(name)
    arms = load_experiment(path).arms
    for arm in wanted:
        if arm not in arms:
            raise ConfigError(f"--strategies names {arm!r}, which is no arm of {path.name}; it has {', '.join(arms)}")
    found = []
    for arm in wanted or arms:
        other = [section for section in arms[arm] if section not in _OWN]
        if other:
            raise ConfigError(
                f"{path.name}: the arm {arm!r} changes [{other[0]}], but a probe compares strategies on the same model and "
                "data; name the other arms with --strategies"
            )
        found.append(Arm(arm, parse_config(merge(raw, arms[arm]), source=f"{path.name}, arm {arm!r}")))
    return found


def _gradient(config: Config) -> tuple[Any, ...]:
    return (*(getattr(config, section) for section in _GRADIENT), config.run.prompts_per_step)
