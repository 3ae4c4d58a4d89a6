"""The engine of a recipe."""

from __future__ import annotations

import torch

from deepgrpo.config import Config
from deepgrpo.engines.base import Engine
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.model.policy import Policy


def build_engine(config: Config, policy: Policy) -> Engine:
    """What samples from `policy`, whose weights it uses as they are at each call."""
    return EmbeddedEngine(
        policy, max_rows=config.engine.max_rows, keep_bytes=config.engine.keep_mb * 2**20,
        dtype=getattr(torch, config.engine_dtype),
    )  # fmt: skip
