"""Section `env`: the environment that answers the model between its turns. One model per type, each with its class."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from deepgrpo.config.base import PathText, Section


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


class UserEnv(EnvBase):
    """Your own environment, from a file or an installed module (docs/agents.md)."""

    implementation = "deepgrpo.envs.user:UserEnvironment"
    type: Literal["user"] = "user"
    env: PathText
    """The class: "path/to/file.py:Name" or "package.module:Name"."""
    options: dict[str, Any] = {}
    """Arguments of the class, by name, e.g. { size = 8 }."""


EnvConfig = UserEnv
"""Registry of environments: `type` chooses the section, and the section names its implementation. With a second type this is
`Annotated[UserEnv | ..., Field(discriminator="type")]`."""
