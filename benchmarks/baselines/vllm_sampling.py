"""Sampling by vLLM through the engine that runs use, in a process of its own.

One process samples for all rounds. While other arms run it waits for a line, which takes no processor time.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.arms import Arm, BenchSetting, LeftOutError, Timed
from benchmarks.workloads import Workload, branch_requests, main_requests
from deepgrpo.config import VLLMEngineConfig
from deepgrpo.engines.base import SamplingParams
from deepgrpo.engines.vllm.engine import PYTHON, VLLMEngine
from deepgrpo.errors import ConfigError, EngineError
from deepgrpo.model.policy import Policy
from deepgrpo.records import Tree

KV_GIB = 1.0


def vllm_arm(
    name: str, setting: BenchSetting, policy: Policy, trees: Sequence[Tree], rows: int, *, prefix_caching: bool = True
) -> Arm:
    """Rollouts, then branches from their prefixes, in bfloat16. Raises LeftOutError if no environment has vLLM."""
    engine, workload = vllm_engine(setting, policy, rows, prefix_caching=prefix_caching), setting.workload
    version = engine.process.version
    note = f"{describe(engine)}; peak is that of its process with {KV_GIB:g} GiB of cache"
    return Arm(
        name, lambda: sample(engine, workload, trees), note, lambda: engine.process.peak_mb, versions={"vllm": version}
    )


def vllm_engine(setting: BenchSetting, policy: Policy, rows: int, *, prefix_caching: bool) -> VLLMEngine:
    """The engine for a workload, closed when the benchmark ends. Raises LeftOutError if no environment has vLLM."""
    python, workload = _python(setting), setting.workload
    engine = VLLMEngine(
        policy,
        VLLMEngineConfig(max_rows=rows, kv_cache_gb=KV_GIB, python=str(python), prefix_caching=prefix_caching),
        dtype=torch.bfloat16, longest=workload.prompt + workload.response,
    )  # fmt: skip
    setting.closing.callback(engine.close)
    return engine


def describe(engine: VLLMEngine) -> str:
    caching = "prefix caching" if engine.config.prefix_caching else "every request encodes its prefix"
    return f"vLLM {engine.process.version}, {caching}, bfloat16"


def sample(engine: VLLMEngine, workload: Workload, trees: Sequence[Tree]) -> Timed:
    """The rollouts and branches of a step; the seconds are vLLM's own, without the way to it and back."""
    # another step has other weights: what an earlier one has encoded is of no use, and the same prompts come again
    engine.drop_prefixes()
    before, params = engine.vllm_seconds, SamplingParams()
    groups, stats = engine.sample(main_requests(workload, trees), params)
    branches = branch_requests(workload, trees, groups)
    if branches:
        stats += engine.sample(branches, params)[1]
    each = workload.rollouts * workload.response + workload.failed * workload.branches * workload.branch
    if stats.sampled_tokens != len(trees) * each:
        raise EngineError(f"vLLM sampled {stats.sampled_tokens} tokens and not {len(trees) * each}, which were asked for")
    return Timed(stats.sampled_tokens, engine.vllm_seconds - before)


def _python(setting: BenchSetting) -> Path:
    """The interpreter of an environment that has vLLM."""
    named = setting.vllm_python or (Path(os.environ[PYTHON]) if os.environ.get(PYTHON) else None)
    if named is None:
        if importlib.util.find_spec("vllm") is not None:
            return Path(sys.executable)
        raise LeftOutError(
            "no environment with vLLM is named; make one (scripts/setup-vllm.sh) and give its interpreter with "
            f"--vllm-python .venv-vllm/bin/python or {PYTHON}"
        )
    if not named.is_file():
        raise ConfigError(f"--vllm-python {str(named)!r} is no file; name the interpreter of an environment with vLLM")
    return named
