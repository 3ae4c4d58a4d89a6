"""Where to explore: strategies, and the loop in which their trees grow."""

from __future__ import annotations

from typing import Any, Literal

from deepgrpo.config import DeepExplore, ExploreConfig, RootExplore
from deepgrpo.explore.base import Strategy


def build_strategy(config: ExploreConfig, *, scale: Literal["none", "std"], tokenizer: Any) -> Strategy:
    """The strategy of a recipe.

    Args:
        config: the section `explore`; its type chooses the file.
        scale: how advantages are scaled (`credit.scale`).
        tokenizer: tells the text of a token, by which rollouts are cut into segments.
    """
    # imported here: each file stands alone, and none is loaded unless it is used
    from deepgrpo.explore.deep import DeepStrategy
    from deepgrpo.explore.root import RootStrategy

    if isinstance(config, RootExplore):
        return RootStrategy.build(config, scale, tokenizer)
    assert isinstance(config, DeepExplore)
    return DeepStrategy.build(config, scale, tokenizer)
