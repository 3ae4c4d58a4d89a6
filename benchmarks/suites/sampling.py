"""The rollouts and branches of one step, lengths as given: our engine, transformers, vLLM."""

from __future__ import annotations

from functools import cached_property, partial

import numpy as np
import torch

from benchmarks.arms import Arm, BenchSetting, Offer, Suite
from benchmarks.baselines.hf_generate import continuous_arm, generate_arm
from benchmarks.baselines.vllm_sampling import vllm_arm
from benchmarks.workloads import branch_requests, build_policy, build_trees, main_requests
from deepgrpo import rng
from deepgrpo.engines.base import SamplingParams
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.model.policy import Policy
from deepgrpo.records import SampleRequest

ROWS = 64
"""Sequences decoded at once."""
KEEP = 2**31
"""Bytes for the keys and values of rollouts."""
SPREAD = (64, 256, 94.0)
"""Requests of spread lengths: how many, the longest, and the mean."""


def sampling_suite(setting: BenchSetting) -> Suite:
    arms, workload = _Arms(setting), setting.workload

    def generate(name: str, dtype: torch.dtype, rows: int | None = None) -> Arm:
        return generate_arm(name, arms.policy, arms.trees, workload, dtype, rows)

    half, full = torch.bfloat16, torch.float32
    return Suite(
        baseline="hf_generate",
        offers=[
            Offer("hf_generate", lambda: generate("hf_generate", full)),
            Offer("hf_generate_batched", lambda: generate("hf_generate_batched", full, ROWS)),
            Offer("hf_generate_bf16", lambda: generate("hf_generate_bf16", half)),
            # it has a fixed cost per call, which weighs much on a benchmark of two calls
            Offer("hf_continuous", lambda: continuous_arm(arms.policy, arms.trees, workload), default=False),
            Offer("engine_fp32", lambda: arms.engine("engine_fp32", full, KEEP, "branches from kept keys")),
            Offer(
                "engine_fp32_no_keep",
                lambda: arms.engine("engine_fp32_no_keep", full, 0, "branches encode their prefix once per pivot"),
            ),
            Offer("engine_bf16", lambda: arms.engine("engine_bf16", half, KEEP, "branches from kept keys, bfloat16")),
            Offer(
                "engine_bf16_no_keep",
                lambda: arms.engine("engine_bf16_no_keep", half, 0, "branches encode their prefix once per pivot, bfloat16"),
                default=False,
            ),
            Offer("vllm_bf16", lambda: vllm_arm("vllm_bf16", setting, arms.policy, arms.trees, ROWS)),
            Offer(
                "vllm_bf16_no_prefix",
                lambda: vllm_arm("vllm_bf16_no_prefix", setting, arms.policy, arms.trees, ROWS, prefix_caching=False),
                default=False,
            ),
            Offer("spread_static_bf16", partial(arms.spread, refill=False)),
            Offer("spread_engine_bf16", partial(arms.spread, refill=True)),
        ],
        pairs=[
            ("engine_fp32", "hf_generate"), ("engine_fp32", "hf_generate_batched"), ("engine_fp32", "hf_continuous"),
            ("engine_fp32", "engine_fp32_no_keep"), ("engine_bf16", "hf_generate_bf16"), ("engine_bf16", "vllm_bf16"),
            ("engine_bf16_no_keep", "vllm_bf16_no_prefix"), ("engine_bf16", "engine_bf16_no_keep"),
            ("vllm_bf16", "vllm_bf16_no_prefix"),
            ("spread_engine_bf16", "spread_static_bf16"),
        ],
    )  # fmt: skip


class _Arms:
    def __init__(self, setting: BenchSetting) -> None:
        self.workload = setting.workload
        self.trees = build_trees(setting.workload)

    @cached_property
    def policy(self) -> Policy:
        return build_policy(self.workload)

    def engine(self, name: str, dtype: torch.dtype, keep: int, note: str) -> Arm:
        engine, params = EmbeddedEngine(self.policy, max_rows=ROWS, keep_bytes=keep, dtype=dtype), SamplingParams()
        mains = main_requests(self.workload, self.trees)

        def run() -> int:
            groups, stats = engine.sample(mains, params, keep=keep > 0)
            branches = branch_requests(self.workload, self.trees, groups)
            if branches:
                stats += engine.sample(branches, params)[1]
            engine.forget()
            return stats.sampled_tokens

        return Arm(name, run, note)

    def spread(self, refill: bool) -> Arm:
        """64 requests of spread lengths (mean 94, longest 256): all at once, or one static batch per prompt."""
        random = np.random.default_rng(0)
        count, longest_of_all, mean = SPREAD
        # log-normal with sigma 0.6, whose mean is exp(mu + sigma² / 2)
        draws = random.lognormal(np.log(mean) - 0.18, 0.6, count)
        lengths = np.clip(draws, min(16, longest_of_all), longest_of_all).astype(int)
        lengths[0] = longest_of_all
        prompts = [
            tuple(int(t) for t in random.integers(10, self.workload.vocabulary, self.workload.prompt))
            for _ in range(-(-count // 8))
        ]
        requests = [SampleRequest(prompts[i // 8], (rng.key("s", i),), int(n)) for i, n in enumerate(lengths)]
        engine = EmbeddedEngine(self.policy, max_rows=ROWS, dtype=torch.bfloat16)

        def continuous() -> int:
            return engine.sample(requests, SamplingParams())[1].sampled_tokens

        def static() -> int:
            # as a batch of one prompt's rollouts is decoded without taking out what has ended: all run to the longest
            for start in range(0, count, 8):
                part = requests[start : start + 8]
                longest = max(r.max_new_tokens for r in part)
                keys = tuple(r.keys[0] for r in part)
                engine.sample([SampleRequest(part[0].prefix, keys, longest)], SamplingParams())
            return int(lengths.sum())

        if refill:
            return Arm("spread_engine_bf16", continuous, "the same requests at once, ended rows taken out")
        return Arm("spread_static_bf16", static, f"{count} requests of spread lengths, one static batch per prompt")
