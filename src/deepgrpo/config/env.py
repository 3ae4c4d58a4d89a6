"""Section `env`: the environment that answers the model between its turns. One model per type, each with its class."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from deepgrpo.config.base import NonNegative, PathText, Section


class EnvBase(Section):
    """Base of the environments' sections: limits of an episode."""

    implementation: ClassVar[str]
    """module:Class of the environment, imported only when a recipe uses it."""

    type: str
    max_turns: PositiveInt = 8
    """Most turns of the model in an episode; one that needs more is truncated."""
    max_turn_tokens: PositiveInt | None = None
    """Longest turn of the model, in tokens; an episode with a longer one is truncated. none: only `sampling.max_new_tokens`,
    which limits a whole episode, observations included."""


def check_episodes(recipe: Any) -> None:
    """Raise ValueError for keys that do not go with an environment, or that only an environment gives a meaning."""
    if recipe.env is not None:
        if not recipe.explore.in_episodes:
            raise ValueError(
                f'explore.type is "{recipe.explore.type}", which cannot explore the episodes of an environment; choose '
                'another, such as "root", "deep", "random" or "allocate", or remove [env]'
            )
        if recipe.reward.overlong is not None:
            raise ValueError(
                "reward.overlong is a penalty for one long response, and an episode of [env] has several turns; remove it, and "
                "set env.max_turn_tokens"
            )
        return
    segments = getattr(recipe.explore, "segments", None)
    if segments is not None and segments.type == "turn":
        raise ValueError(
            'explore.segments.type is "turn", but the recipe has no environment, and a response is one turn; add [env], '
            'or choose another type, such as "sentence"'
        )
    if "env" in recipe.reward.types:
        raise ValueError(
            'reward.type is "env", but the recipe has no environment that gives rewards; add [env] or choose another reward'
        )


class UserEnv(EnvBase):
    """Your own environment, from a file or an installed module (docs/agents.md)."""

    implementation = "deepgrpo.envs.user:UserEnvironment"
    type: Literal["user"] = "user"
    env: PathText
    """The class: "path/to/file.py:Name" or "package.module:Name"."""
    options: dict[str, Any] = {}
    """Arguments of the class, by name, e.g. { size = 8 }."""


class ToolsEnv(EnvBase):
    """Your own tools: Python functions with types and docstrings, shown by the model's chat template, called in processes.

    A result is an observation. So is a call that is malformed, hangs, crashes, raises or returns too much.
    """

    implementation = "deepgrpo.envs.tools:ToolsEnvironment"
    type: Literal["tools"] = "tools"
    functions: PathText
    """The functions: "path/to/file.py:[search, calculator]" or "package.module:[search]"."""
    timeout_s: PositiveFloat = 10.0
    """Seconds per call; after that the worker is killed and the observation says so."""
    memory_mb: PositiveInt = 1024
    """Memory that a call may take beyond that of its worker, in MiB (where the system can limit it)."""
    output_chars: PositiveInt = 4000
    """Longest result in characters; a longer one is cut, and the observation says so."""
    max_calls: PositiveInt = 8
    """Most calls in one turn."""
    workers: PositiveInt = 2
    """Worker processes: calls at the same time."""


def _refuse_other_data(task: str, recipe: Any, missing: str) -> None:
    """Refuse questions of another task: an environment of a generated task reads what its questions bring along."""
    if recipe.data.type != task:
        raise ValueError(
            f'env.type is "{task}", but data.type is "{recipe.data.type}" and has no {missing}; set data.type = "{task}" or '
            'choose env.type = "tools" or "user"'
        )


class LookupEnv(EnvBase):
    """Lookups in the tables of `data.type = "lookup"`, one per turn: `f3?` is answered by `7;`."""

    implementation = "deepgrpo.envs.lookup:LookupEnvironment"
    type: Literal["lookup"] = "lookup"
    price: NonNegative = 0.0
    """Subtracted from the reward for each lookup, malformed ones included."""

    def check(self, recipe: Any) -> None:
        _refuse_other_data(self.type, recipe, "tables to look up")
        if self.price * self.max_turns >= 1:
            raise ValueError(
                f"env.price is {self.price:g}, and env.max_turns = {self.max_turns} lookups would cost as much as the answer "
                "earns, 1; lower one of the two"
            )


class MultihopEnv(EnvBase):
    """Search over the generated documents of `data.type = "multihop"` (needs the extra `search`). The reward is the F1 of the
    answer's words.
    """

    implementation = "deepgrpo.envs.multihop:MultihopEnvironment"
    type: Literal["multihop"] = "multihop"
    results: PositiveInt = 3
    """Documents that a search finds."""
    max_calls: PositiveInt = 4
    """Most calls in one turn."""

    def check(self, recipe: Any) -> None:
        _refuse_other_data(self.type, recipe, "documents to search")


class OpenEnv(EnvBase):
    """Environment behind an OpenEnv server (needs the extra `openenv`). It cannot give its states, so branches are replayed."""

    implementation = "deepgrpo.envs.openenv:OpenEnvEnvironment"
    type: Literal["openenv"] = "openenv"
    url: Annotated[str, Field(pattern=r"^(https?|wss?)://")]
    """Address of the server, e.g. "http://127.0.0.1:8000"."""
    action: str | None = "message"
    """Field of the environment's action that takes the text of a turn; none: the turn is a JSON object with all fields."""
    observation: str | None = None
    """Field of its observation that the model sees; none: the whole observation as JSON."""
    reset_columns: tuple[str, ...] = ()
    """Columns of the row that are passed to the environment's reset, by name."""
    timeout_s: PositiveFloat = 60.0
    """Seconds for an answer; without one, the episode ends."""


EnvConfig = Annotated[ToolsEnv | UserEnv | LookupEnv | MultihopEnv | OpenEnv, Field(discriminator="type")]
"""Registry of environments: `type` chooses the section, and the section names its implementation."""
