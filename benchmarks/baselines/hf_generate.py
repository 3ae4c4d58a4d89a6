"""Sampling by transformers: `generate`, and its continuous batching."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.arms import Arm, LeftOutError
from benchmarks.workloads import Workload
from deepgrpo.model.policy import Policy
from deepgrpo.records import Tree

Tokens = tuple[int, ...]


def plain_copy(policy: Policy, dtype: torch.dtype) -> Any:
    """The model as transformers gives it: its own attention, weights in `dtype`, no gradients behind them."""
    model = copy.deepcopy(policy.causal)
    for parameter in model.parameters():  # buffers stay: rotary frequencies lose their positions in bfloat16
        parameter.data, parameter.grad = parameter.data.to(dtype), None
    model.set_attn_implementation("sdpa")
    model.config.dtype = dtype
    return model


def generate_arm(
    name: str, policy: Policy, trees: Sequence[Tree], workload: Workload, dtype: torch.dtype, rows: int | None
) -> Arm:
    """`generate` on repeated prompts.

    Args:
        rows: sequences in a batch, from whatever prompts; None: one batch per prompt and one per pivot.
    """
    model = plain_copy(policy, dtype).eval()

    def sample(prefixes: Sequence[Tokens], copies: int, count: int) -> list[Tokens]:
        wanted = [prefix for prefix in prefixes for _ in range(copies)]
        size = rows or copies
        parts = [_generate(model, wanted[i : i + size], count) for i in range(0, len(wanted), size)]
        return [row for part in parts for row in part]

    def run() -> int:
        mains = sample([tree.prompt.tokens for tree in trees], workload.rollouts, workload.response)
        branches = sample(_prefixes(workload, trees, mains), workload.branches, workload.branch)
        return sum(map(len, mains)) + sum(map(len, branches))

    batch = "batch per prompt" if rows is None else f"batches of {rows} rows"
    return Arm(name, run, f"transformers' generate on repeated prompts, {batch}, {str(dtype).removeprefix('torch.')}")


def continuous_arm(policy: Policy, trees: Sequence[Tree], workload: Workload) -> Arm:
    """Continuous batching with a paged cache that shares prefixes. Raises LeftOutError before transformers 5.8."""
    try:
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig
    except ImportError:
        raise LeftOutError("transformers has no continuous batching; pip install 'transformers>=5.8'") from None
    model = plain_copy(policy, torch.float32).eval()
    settings = ContinuousBatchingConfig(**continuous_settings(workload), return_logprobs=True)

    def sample(prefixes: Sequence[Tokens], copies: int, count: int) -> list[Tokens]:
        if not prefixes:
            return []
        wanted = [list(prefix) for prefix in prefixes for _ in range(copies)]
        config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=count, eos_token_id=-1, pad_token_id=0
        )
        outputs = model.generate_batch(wanted, generation_config=config, continuous_batching_config=settings)
        return [tuple(output.generated_tokens) for output in outputs.values()]

    def run() -> int:
        mains = sample([tree.prompt.tokens for tree in trees], workload.rollouts, workload.response)
        branches = sample(_prefixes(workload, trees, mains), workload.branches, workload.branch)
        return sum(map(len, mains)) + sum(map(len, branches))

    return Arm("hf_continuous", run, "transformers' continuous batching, prefixes shared, float32")


def continuous_settings(workload: Workload) -> dict[str, int]:
    """64 sequences at once, as in our engine, in twice the cache that they take: by itself it takes most of the memory."""
    page, rows = 32, 64
    longest = -(-(workload.prompt + workload.response) // page)
    return {
        "page_size": page, "num_blocks": 2 * rows * longest, "max_batch_tokens": 2048, "max_requests_per_batch": rows,
    }  # fmt: skip


def _prefixes(workload: Workload, trees: Sequence[Tree], mains: Sequence[Tokens]) -> list[Tokens]:
    """Prefixes of the branches, which begin in the first rollouts of each tree."""
    return [
        tree.prompt.tokens + mains[i * workload.rollouts + s][: workload.pivot]
        for i, tree in enumerate(trees) for s in range(workload.failed)
    ]  # fmt: skip


@torch.no_grad()
def _generate(model: Any, prompts: Sequence[Tokens], count: int) -> list[Tokens]:
    ids = torch.tensor(prompts, device=model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        min_new_tokens=count, max_new_tokens=count, pad_token_id=0,
    )  # fmt: skip
    return [tuple(row) for row in output[:, ids.shape[1] :].tolist()]
