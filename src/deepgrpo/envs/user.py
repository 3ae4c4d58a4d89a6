"""A user's own environment: loaded from a file, each return value checked at the call.

`env = { type = "user", env = "my_env.py:MyEnv" }`. The class is built with `options` as arguments and has the methods `start`
and `step` of `Environment` (base.py); it may derive from it. `step` returns a `Turn`, or a dict with its fields.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from deepgrpo.config import UserEnv
from deepgrpo.envs.base import Environment, State, Turn
from deepgrpo.errors import ConfigError, DeepGRPOError, EnvError
from deepgrpo.loading import load_object, show, where
from deepgrpo.records import Prompt

KEY = "env.env"
_FIELDS = {field.name for field in fields(Turn)}


class UserEnvironment(Environment):
    """A user's environment behind checks."""

    def __init__(self, inner: Any, name: str) -> None:
        self._inner, self._name = inner, name
        self.turn_ends = tuple(getattr(inner, "turn_ends", Environment.turn_ends))
        self.role = getattr(inner, "role", Environment.role)
        self.rewinds = getattr(inner, "rewinds", Environment.rewinds)

    @classmethod
    def build(cls, config: UserEnv, tokenizer: Any) -> UserEnvironment:
        """Load and build it. Raises ConfigError: file or name is missing, `options` do not fit, or a method is missing."""
        kind = load_object(config.env, KEY)
        try:
            inner = kind(**config.options)
        except Exception as error:
            raise ConfigError(
                f"{KEY} is {config.env!r}, and building it with env.options = {config.options} raised {where(error)}; correct "
                "the class or its options"
            ) from error
        for method in ("start", "step"):
            if not callable(getattr(inner, method, None)):
                raise ConfigError(
                    f"{KEY} is {config.env!r}, which has no method {method!r}; an environment has start(prompt) and "
                    "step(state, text)"
                )
        return cls(inner, config.env)

    def start(self, prompt: Prompt) -> State:
        return self._plain(self._call("start", lambda: self._inner.start(prompt)), "start")

    def step(self, state: State, text: str) -> Turn:
        return self._turn(self._call("step", lambda: self._inner.step(copy.deepcopy(state), text)), "step")

    def step_all(self, items: Sequence[tuple[State, str]]) -> list[Turn]:
        if not hasattr(self._inner, "step_all"):
            return super().step_all(items)
        found = self._call("step_all", lambda: list(self._inner.step_all(copy.deepcopy(list(items)))))
        if len(found) != len(items):
            raise EnvError(f"{self._name}: step_all returned {len(found)} turns for {len(items)}; return one each, in order")
        return [self._turn(each, "step_all") for each in found]

    def tools(self) -> list[dict[str, Any]] | None:
        return self._call("tools", lambda: self._inner.tools()) if hasattr(self._inner, "tools") else None

    def finish(self, state: State) -> None:
        if hasattr(self._inner, "finish"):
            self._call("finish", lambda: self._inner.finish(state))

    def close(self) -> None:
        if hasattr(self._inner, "close"):
            self._call("close", lambda: self._inner.close())

    def _call(self, method: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except DeepGRPOError:
            raise
        except (Exception, SystemExit) as error:
            raise EnvError(
                f"{self._name}: {method} raised {where(error)}; return an observation that says what the model did wrong"
            ) from error

    def _turn(self, found: Any, method: str) -> Turn:
        if isinstance(found, Mapping):
            if unknown := [key for key in found if key not in _FIELDS]:
                raise EnvError(
                    f"{self._name}: {method} returned the field {unknown[0]!r}; a turn has {', '.join(sorted(_FIELDS))}"
                )
            if "state" not in found:
                raise EnvError(f"{self._name}: {method} returned a dict without 'state'; return the state after the turn")
            found = Turn(**found)
        if not isinstance(found, Turn):
            raise EnvError(f"{self._name}: {method} returned {show(found)}; return a Turn, or a dict with its fields")
        if not isinstance(found.observation, str):
            raise EnvError(f"{self._name}: {method} returned the observation {show(found.observation)}; return a string")
        reward = found.reward
        if reward is not None:
            try:
                reward = float(reward)
            except (TypeError, ValueError):
                raise EnvError(f"{self._name}: {method} returned the reward {show(reward)}; return a number or None") from None
        return Turn(
            self._plain(found.state, method), found.observation, reward, bool(found.done), int(found.calls),
            int(found.failed_calls), float(found.seconds),
        )  # fmt: skip

    def _plain(self, state: State, method: str) -> State:
        """The state as JSON gives it back: a later change of the user's object does not reach it."""
        try:
            return json.loads(json.dumps(state, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise EnvError(
                f"{self._name}: {method} returned the state {show(state)}, which is no plain JSON ({error}); use dicts with "
                "string keys, lists, strings, numbers, true, false and null"
            ) from error
