"""Environments: what answers the model between its turns. `base.py` has the protocol, the section `env` the registry."""

from __future__ import annotations

import pkgutil
from typing import Any

from deepgrpo.config import EnvConfig
from deepgrpo.envs.base import Environment


def build_environment(config: EnvConfig, tokenizer: Any) -> Environment:
    """Build the environment of a recipe, importing only its own file. The caller closes it.

    Args:
        config: the section `env`; it names its implementation.
        tokenizer: the policy's tokenizer, whose chat template has the model's form of a tool call.

    Raises ConfigError if a user's class or functions cannot be loaded.
    """
    environment: Environment = pkgutil.resolve_name(config.implementation).build(config, tokenizer)
    return environment
