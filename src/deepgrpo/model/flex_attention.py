"""Tree attention by torch's flex attention: one fused kernel that skips blocks without a visible pair.

A key k is visible to a query q if `k ≤ q < until(k)`; the segments give every token its `until` (model/tree_attention.py).
Tokens form blocks of 128. A block of keys is visible up to the largest `until` among them, and fully visible to blocks of
queries after it that end before the smallest `until`. So two numbers per block of keys determine the block lists, without a
mask of tokens × tokens:

    empty      queries before the keys, or from the largest until on       skipped
    full       queries after the keys that end by the smallest until       computed without the rule
    partial    all other blocks                                            rule evaluated per pair

Tested on the CPU: the lists against torch's `create_block_mask`; the forward pass against the dense oracle, with torch's
eager function, which does not read the lists, and once with its compiled kernel, which does. The backward pass exists on CUDA
alone: `make test-cuda` tests both there, and the gate (model/tree_gate.py) tests them on the model before training.

Shapes: H query heads, h key/value heads, S packed tokens, d head dimension, n blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

BLOCK = 128
"""Tokens per block of queries and of keys: the default of torch's kernels."""
RECOMPILE_LIMIT = 64
"""Cases that are compiled in one process; beyond it the call raises."""


def block_mask(
    segments: Sequence[tuple[int, int, int, int]], length: int, device: torch.device, block: int = BLOCK
) -> BlockMask:
    """Block mask of flex attention for a pack of `length` tokens with segments (start, end, until, parent)."""
    blocks = -(-length // block)
    until = np.zeros(blocks * block, dtype=np.int32)  # padding of the last block: visible to no query
    for start, end, last, _ in segments:
        until[start:end] = last
    firsts = np.arange(0, length, block)
    nearest, farthest = (reduce.reduceat(until[:length], firsts)[None, :] for reduce in (np.minimum, np.maximum))
    query, key = np.arange(blocks)[:, None], np.arange(blocks)[None, :]
    some = (key <= query) & (query * block < farthest)
    # a block of queries that extends past the end is never full, as no until exceeds the length
    full = (key < query) & ((query + 1) * block <= nearest)
    until_S = torch.from_numpy(until).to(device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < until_S[key])

    return BlockMask.from_kv_blocks(
        *_listed(some & ~full, device), *_listed(full, device),
        BLOCK_SIZE=block, mask_mod=visible, seq_lengths=(length, length),
    )  # fmt: skip


def _listed(chosen: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Count of chosen blocks per row of `[n, n]`, `[1, 1, n]`, and their indices, chosen ones first, `[1, 1, n, n]`."""
    count = chosen.sum(1).astype(np.int32)
    order = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(count).to(device)[None, None], torch.from_numpy(order).to(device)[None, None]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Attention `[1, H, S, d]` under a block mask: compiled on CUDA; on the CPU slow and without a gradient."""
    function: Any = compiled_attention() if query.device.type == "cuda" else torch_flex_attention
    result: Tensor = function(
        query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        # otherwise short packs would use another kernel, which the gate has not tested
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )  # fmt: skip
    return result


@functools.cache
def compiled_attention(backend: Any = "inductor") -> Callable[..., Any]:
    """The fused kernel, compiled at the first call and cached for the process.

    Dynamic shapes, as pack lengths vary; a full graph, since otherwise torch silently falls back to a function that
    materializes all scores of tokens × tokens. It recompiles for packs of one block, another dtype, another number of
    heads, and with or without gradients: up to seven cases per model, where torch's default limit is eight.
    """
    from torch._dynamo import config

    compiled: Callable[..., Any] = torch.compile(torch_flex_attention, dynamic=True, fullgraph=True, backend=backend)
    # an argument of torch.compile only since torch 2.13
    limited: Callable[..., Any] = config.patch(recompile_limit=RECOMPILE_LIMIT)(compiled)
    return limited
