"""Exploration: strategies, and the loop in which their trees grow."""

from __future__ import annotations

import pkgutil

from deepgrpo.config import ExploreConfig
from deepgrpo.explore.base import Context, Strategy


def build_strategy(config: ExploreConfig, context: Context) -> Strategy:
    """Build the strategy of a recipe, importing only its own file.

    Args:
        config: the section `explore`; it names its implementation.
        context: scale of advantages, tokenizer and task.

    Raises ConfigError or StrategyError if a user's strategy cannot be loaded or breaks its contract.
    """
    strategy: Strategy = pkgutil.resolve_name(config.implementation).build(config, context)
    return strategy
