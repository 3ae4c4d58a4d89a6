"""Where to explore: strategies, and the loop in which their trees grow."""

from __future__ import annotations

from typing import Any, Literal

from deepgrpo.config import (
    AttnRLExplore,
    DeepExplore,
    ExploreConfig,
    FR3EExplore,
    OracleExplore,
    RandomExplore,
    RootExplore,
    SPOTreeExplore,
    TreeRLExplore,
)
from deepgrpo.explore.base import Strategy


def build_strategy(
    config: ExploreConfig, *, scale: Literal["none", "std"], tokenizer: Any, task: Any = None
) -> Strategy:
    """The strategy of a recipe.

    Args:
        config: the section `explore`; its type chooses the file.
        scale: how advantages are scaled (`credit.scale`).
        tokenizer: tells the text of a token, by which rollouts are cut into segments.
        task: what belongs to the data section (`prompts.tasks.build_task`); only the oracle asks it something.
    """
    # imported here: each file stands alone, and none is loaded unless it is used
    if isinstance(config, RootExplore):
        from deepgrpo.explore.root import RootStrategy

        return RootStrategy.build(config, scale, tokenizer)
    if isinstance(config, DeepExplore):
        from deepgrpo.explore.deep import DeepStrategy

        return DeepStrategy.build(config, scale, tokenizer)
    if isinstance(config, RandomExplore):
        from deepgrpo.explore.random import RandomStrategy

        return RandomStrategy.build(config, scale, tokenizer)
    if isinstance(config, TreeRLExplore):
        from deepgrpo.explore.treerl import TreeRLStrategy

        return TreeRLStrategy.build(config, scale, tokenizer)
    if isinstance(config, FR3EExplore):
        from deepgrpo.explore.fr3e import FR3EStrategy

        return FR3EStrategy.build(config, scale, tokenizer)
    if isinstance(config, SPOTreeExplore):
        from deepgrpo.explore.spo_tree import SPOTreeStrategy

        return SPOTreeStrategy.build(config, scale, tokenizer)
    if isinstance(config, AttnRLExplore):
        from deepgrpo.explore.attnrl import AttnRLStrategy

        return AttnRLStrategy.build(config, scale, tokenizer)
    assert isinstance(config, OracleExplore)
    from deepgrpo.explore.oracle import OracleStrategy

    # the recipe is checked for it: only the synthetic task knows first errors
    return OracleStrategy.build(config, scale, tokenizer, task.first_error)
