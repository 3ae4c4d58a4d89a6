"""Engines continue prefixes with the current policy: `base.py` says what that means."""

from __future__ import annotations

from typing import Literal

import torch

from deepgrpo.config import EmbeddedEngine as EmbeddedConfig
from deepgrpo.config import EngineConfig
from deepgrpo.engines.base import Engine
from deepgrpo.model.policy import Policy


def build_engine(
    config: EngineConfig, policy: Policy, *, dtype: Literal["float32", "bfloat16"] | None = None,
    longest: int | None = None, trust_remote_code: bool = False,
) -> Engine:  # fmt: skip
    """The engine of a recipe; its caller closes it.

    Args:
        config: the section `engine`; its type chooses the engine.
        policy: what is sampled.
        dtype: of sampling; None: what the section says.
        longest: prompt plus response, in tokens; None: the model's context.
        trust_remote_code: as in the section `model`, for an engine that loads the model itself.
    """
    wanted = dtype or config.dtype
    chosen: torch.dtype = policy.dtype if wanted == "learner" else getattr(torch, wanted)
    # imported here: neither loads what the other needs
    if isinstance(config, EmbeddedConfig):
        from deepgrpo.engines.embedded.engine import EmbeddedEngine

        return EmbeddedEngine(policy, max_rows=config.max_rows, keep_bytes=config.keep_mb * 2**20, dtype=chosen)
    from deepgrpo.engines.vllm.engine import VLLMEngine

    return VLLMEngine(policy, config, dtype=chosen, longest=longest, trust_remote_code=trust_remote_code)
