"""Whether vLLM can be had in these tests, and engines of it that start quickly."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

from deepgrpo.config import VLLMEngine as VLLMConfig
from deepgrpo.engines import build_engine
from deepgrpo.engines.vllm.engine import PYTHON, VLLMEngine
from deepgrpo.model.policy import Policy

HERE = importlib.util.find_spec("vllm") is not None or bool(os.environ.get(PYTHON))

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not HERE, reason=f"no vllm in this environment and no other named in {PYTHON}; see make test-vllm"),
]


def vllm_engine(policy: Policy, *, longest: int | None = None, trial: str = "float32", **config: Any) -> VLLMEngine:
    """Small and uncompiled unless the config says otherwise."""
    small = {"max_rows": 32, "kv_cache_gb": 0.25, "eager": True, "dtype": trial}
    engine = build_engine(VLLMConfig.model_validate({**small, **config}), policy, longest=longest)
    assert isinstance(engine, VLLMEngine)
    return engine
