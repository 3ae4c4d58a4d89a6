"""Tree attention by torch's flex attention: one fused kernel that visits only the blocks in which somebody sees somebody.

A query q sees a key k if `k ≤ q < until(k)`: the segments give every token its `until` (model/tree_attention.py). Tokens
are taken 128 by 128. For a block of keys the visible queries end at the largest `until` among them, and a block of
queries sees all of them if it lies between the block of keys and the smallest `until`; so the lists of blocks follow from
two numbers per block, and no mask of tokens × tokens is made:

    empty      above the diagonal, or behind the largest until     skipped
    partial    on the diagonal, or where an until lies inside      the rule is asked for each pair
    full       in between                                          computed without asking

What was run, all on the CPU: the lists against torch's `create_block_mask`; the forward pass against the dense oracle, by
torch's eager function, which never reads the lists, and once by its compiled kernel, which does. **Not run: anything on
CUDA.** The backward pass exists only there. So nothing here is trusted: the gate (model/tree_gate.py) tries forward and
backward on the model before anything is trained, and `tests/equivalence/test_tree_flex.py` has tests that wait for CUDA.

Shapes: H query heads, h key/value heads, S packed tokens, d head dimension, n blocks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

BLOCK = 128
"""Tokens per block, of queries and of keys: what torch's kernels expect unless told otherwise."""


def block_mask(
    segments: Sequence[tuple[int, int, int, int]], length: int, device: torch.device, block: int = BLOCK
) -> BlockMask:
    """Who sees whom, for flex attention, from the segments (start, end, until, parent) of a pack of `length` tokens."""
    blocks = -(-length // block)
    until = np.zeros(blocks * block, dtype=np.int32)  # the rest of the last block: seen by nobody
    for start, end, last, _ in segments:
        until[start:end] = last
    firsts = np.arange(0, length, block)
    nearest, farthest = (reduce.reduceat(until[:length], firsts)[None, :] for reduce in (np.minimum, np.maximum))
    query, key = np.arange(blocks)[:, None], np.arange(blocks)[None, :]
    some = (key <= query) & (query * block < farthest)
    # a block of queries that sticks out over the end is never full, as no until lies behind the end
    full = (key < query) & ((query + 1) * block <= nearest)
    until_S = torch.from_numpy(until).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < until_S[key])

    return BlockMask.from_kv_blocks(
        *_listed(some & ~full, device), *_listed(full, device),
        BLOCK_SIZE=block, mask_mod=sees, seq_lengths=(length, length),
    )  # fmt: skip


def _listed(chosen: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each row of `[n, n]` how many blocks are chosen, `[1, 1, n]`, and which, chosen ones first, `[1, 1, n, n]`."""
    count = chosen.sum(1).astype(np.int32)
    order = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(count).to(device)[None, None], torch.from_numpy(order).to(device)[None, None]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Attention `[1, H, S, d]` under a block mask; compiled on CUDA, without gradient and slow on the CPU."""
    function: Any = _compiled() if query.device.type == "cuda" else torch_flex_attention
    result: Tensor = function(
        query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        # short packs would take another kernel, which the gate has not tried
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )  # fmt: skip
    return result


@functools.cache
def _compiled(backend: Any = "inductor") -> Callable[..., Any]:
    """The fused kernel, compiled when first called and kept for the process.

    Dynamic, as every pack has another length; as a full graph, since torch would otherwise fall back, without a word, to
    a function that writes out all scores of tokens × tokens. Compiled once more for packs of one block, another dtype,
    another number of heads, and with or without gradients: one model has up to seven cases, torch's limit is eight.
    """
    known = inspect.signature(torch.compile).parameters  # the limit can be set since torch 2.13
    limit: dict[str, Any] = {"recompile_limit": 64} if "recompile_limit" in known else {}
    compiled: Callable[..., Any] = torch.compile(
        torch_flex_attention, dynamic=True, fullgraph=True, backend=backend, **limit
    )
    return compiled
