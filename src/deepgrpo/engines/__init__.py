"""Engines sample continuations of prefixes from the current policy; `base.py` defines the protocol. Loads no torch"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, Literal

from deepgrpo.config import EngineConfig
from deepgrpo.engines.base import Engine

if TYPE_CHECKING:
    from deepgrpo.model.policy import Policy

ENGINES = {
    "embedded": "deepgrpo.engines.embedded.engine:EmbeddedEngine",
    "vllm": "deepgrpo.engines.vllm.engine:VLLMEngine",
}
"""Class of each `engine.type`, imported when it is built. Its `from_config` takes what `build_engine` passes."""


def build_engine(
    config: EngineConfig, policy: Policy, *, dtype: Literal["float32", "bfloat16"] | None = None,
    longest: int | None = None, trust_remote_code: bool = False,
) -> Engine:  # fmt: skip
    """Build the engine of a recipe. The caller closes it.

    Args:
        config: section `engine`; its type selects the engine.
        policy: policy to sample from.
        dtype: sampling dtype; None: as in the section.
        longest: longest prompt plus response, in tokens; None: the model's context.
        trust_remote_code: as in the section `model`, for an engine that loads the model itself.
    """
    import torch

    wanted = dtype or config.dtype
    chosen: torch.dtype = policy.dtype if wanted == "learner" else getattr(torch, wanted)
    kind = pkgutil.resolve_name(ENGINES[config.type])
    engine: Engine = kind.from_config(
        policy, config, dtype=chosen, longest=longest, trust_remote_code=trust_remote_code
    )
    return engine
