"""Attention over a pack of trees: each token attends to its ancestors and itself, without a mask of tokens × tokens.

In depth-first order the descendants of a segment follow it without a gap. So tree attention is, per segment, one causal
block (the segment with itself) and one dense rectangle (the queries of all descendants with the segment's keys); the partial
results of the segments on a query's path are merged by log-sum-exp. No mask is applied and no key is copied.

The functions are registered with transformers under the name `deepgrpo`. A forward pass with a `tree_plan` uses tree
attention, one with a `decode_plan` uses `decode_attention`, any other uses transformers' own SDPA function; so one model
serves both sampling and learning.

    cascade   the blocks with the CPU's flash kernels, merged by log-sum-exp; backward with the same kernels
    flex      one fused kernel over the blocks with a visible pair; backward on CUDA only (flex_attention.py)
    gather    public API only: one SDPA call per segment, with the gathered keys of its path (any device)
    dense     one SDPA call with a mask of tokens × tokens: the oracle of the tests

Shapes: H query heads, h key/value heads, S packed tokens, d head dimension.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from deepgrpo.model import flex_attention as flex
from deepgrpo.model.decode_attention import DecodePlan, decode_attention

NAME = "deepgrpo"
"""Name of these functions in transformers' registry."""

Kernel = Literal["cascade", "flex", "gather", "dense"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class TreePlan:
    """Visibility between the tokens of a pack; a keyword argument of the forward pass, so that recomputation gets it too.

    Example: the picture in pack/tree.py has segments ((0, 3, 19, -1), (3, 7, 14, 0), (7, 9, 9, 1), ...).
    """

    segments: tuple[tuple[int, int, int, int], ...]
    """(start, end, until, parent) of each segment, parents first."""
    kernel: Kernel = "cascade"
    seen: list[tuple[torch.nn.Module, int | None]] | None = field(default=None, compare=False)
    """If given, each attention layer appends (itself, its window): evidence that every layer uses our function."""
    masks: dict[torch.device, BlockMask] = field(default_factory=dict, compare=False, repr=False)
    """Block masks of `flex_attention`, built by the first layer and reused by the others."""


def cascade_attention(query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float) -> Tensor:
    """Exact tree attention by blocks on the CPU, `[1, H, S, d]`."""
    result: Tensor = _Cascade.apply(query, key, value, plan.segments, scale)
    return result


class _Cascade(torch.autograd.Function):
    """Merges blocks by log-sum-exp in the forward pass; differentiates each block alone in the backward pass.

    The gradient of softmax attention over a union of key blocks is the sum of the blocks' gradients, each computed with the
    output and the log-sum-exp of the union, as in ring attention (arXiv:2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Sequence[tuple[int, int, int, int]], scale: float
    ) -> Tensor:
        # merging in bfloat16 would lose the precision of the kernels
        dtype = torch.promote_types(query.dtype, torch.float32)
        out = query.new_empty(query.shape, dtype=dtype)
        lse = query.new_empty(query.shape[:3], dtype=dtype)
        for start, end, _, _ in segments:
            own = slice(start, end)
            part, part_lse = _flash(query[:, :, own], key[:, :, own], value[:, :, own], 0.0, True, scale=scale)
            out[:, :, own], lse[:, :, own] = part, part_lse
        for start, end, until, _ in segments:
            if until == end:
                continue
            below = slice(end, until)
            part, part_lse = _flash(
                query[:, :, below], key[:, :, start:end], value[:, :, start:end], 0.0, False, scale=scale
            )
            old = lse[:, :, below]
            merged = torch.logaddexp(old, part_lse)
            out[:, :, below].mul_((old - merged).exp_().unsqueeze(-1)).addcmul_(
                part.to(dtype), (part_lse - merged).exp_().unsqueeze(-1)
            )
            old.copy_(merged)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad = grad.contiguous() if grad.stride(-1) != 1 else grad
        dtype = torch.promote_types(query.dtype, torch.float32)
        grads = [torch.zeros(x.shape, dtype=dtype) for x in (query, key, value)]
        for start, end, until, _ in ctx.segments:
            for first, last, causal in ((start, end, True), (end, until, False)):
                if last == first:
                    continue
                rows = slice(first, last)
                d_query, d_key, d_value = _flash_backward(
                    grad[:, :, rows], query[:, :, rows], key[:, :, start:end], value[:, :, start:end],
                    out[:, :, rows], lse[:, :, rows], 0.0, causal, scale=ctx.scale,
                )  # fmt: skip
                grads[0][:, :, rows] += d_query
                grads[1][:, :, start:end] += d_key
                grads[2][:, :, start:end] += d_value
        return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype), None, None


def gather_attention(query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float) -> Tensor:
    """Tree attention with public functions: each segment against the keys of its path, `[1, H, S, d]`."""
    groups = query.shape[1] // key.shape[1]
    key, value = _repeat(key, groups), _repeat(value, groups)
    outputs: list[Tensor] = []
    for start, end, _, parent in plan.segments:
        path = [(start, end)]
        while parent >= 0:
            above = plan.segments[parent]
            path.append((above[0], above[1]))
            parent = above[3]
        spans = path[::-1]
        keys = torch.cat([key[:, :, a:b] for a, b in spans], 2)
        values = torch.cat([value[:, :, a:b] for a, b in spans], 2)
        own, total = end - start, keys.shape[2]
        # a causal mask aligned at the bottom right: the last row sees all keys
        mask = None if own == total else torch.ones(own, total, dtype=torch.bool, device=key.device).tril(total - own)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end], keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
            )
        )
    return torch.cat(outputs, 2)


def flex_attention(query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float) -> Tensor:
    """Tree attention by torch's flex attention, `[1, H, S, d]`: forward on any device, backward on CUDA."""
    mask = plan.masks.get(query.device)
    if mask is None:
        mask = plan.masks[query.device] = flex.block_mask(plan.segments, query.shape[2], query.device)
    return flex.attend(query, key, value, mask, scale)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float) -> Tensor:
    """Tree attention by one call with a mask `[S, S]`, slow and simple, `[1, H, S, d]`."""
    groups = query.shape[1] // key.shape[1]
    mask = visibility(plan, query.shape[2]).to(query.device)
    return F.scaled_dot_product_attention(query, _repeat(key, groups), _repeat(value, groups), attn_mask=mask, scale=scale)


def visibility(plan: TreePlan, length: int) -> Tensor:
    """Mask `[S, S]`: True where key j is visible to query i, that is j ≤ i < until(j)."""
    until = torch.zeros(length, dtype=torch.long)
    for start, end, last, _ in plan.segments:
        # a token is visible to the rest of its segment and to all descendants
        until[start:end] = last
    index = torch.arange(length)
    return (index[None, :] <= index[:, None]) & (index[:, None] < until[None, :])


KERNELS = {"cascade": cascade_attention, "flex": flex_attention, "gather": gather_attention, "dense": dense_attention}


def attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, tree_plan: TreePlan | None = None,
    decode_plan: DecodePlan | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention function that transformers' layers call. Without a plan it is their own SDPA function."""
    if decode_plan is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer: Any = module.layer_idx
        shared = decode_attention(query, key, value, attention_mask, decode_plan, layer, scale)
        return shared.transpose(1, 2).contiguous(), None
    if tree_plan is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    for name in ("s_aux", "softcap", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"tree attention does not support {name}")
    if attention_mask is not None or dropout:
        raise NotImplementedError("tree attention supports neither a mask nor dropout")
    if tree_plan.seen is not None:
        tree_plan.seen.append((module, kwargs.get("sliding_window")))
    if torch.is_autocast_enabled(query.device.type):
        # rotary embeddings promote to float32, and autocast does not cast operators that are called directly
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = KERNELS[tree_plan.kernel](query, key, value, tree_plan, scale)
    return out.transpose(1, 2).contiguous(), None


_WITHOUT_MASK: contextvars.ContextVar[list[int | None] | None] = contextvars.ContextVar("tree_windows", default=None)


@contextlib.contextmanager
def without_mask() -> Iterator[list[int | None]]:
    """Keep transformers from making causal masks; yields the list of windows it requested masks for.

    A pack's positions jump back at every branch. transformers would take each jump for the start of another document and
    mask it, so that branches would silently lose their prefix.
    """
    windows: list[int | None] = []
    token = _WITHOUT_MASK.set(windows)
    try:
        yield windows
    finally:
        _WITHOUT_MASK.reset(token)


def mask_function(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask function that transformers calls: no mask inside `without_mask`, its own SDPA mask otherwise."""
    windows = _WITHOUT_MASK.get()
    if windows is not None:
        windows.append(kwargs.get("local_size"))
        return None
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def register() -> None:
    """Register the functions with transformers. Idempotent."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_function)


def kernels(device: torch.device) -> tuple[Kernel, ...]:
    """Candidate kernels of a device, fastest first; the gate takes the first that passes."""
    # cascade needs equal head dimensions of K and V, flex lacks some sizes; gather supports all that SDPA does
    fastest: dict[str, tuple[Kernel, ...]] = {"cpu": ("cascade",), "cuda": ("flex",)}
    return (*fastest.get(device.type, ()), "gather")


def _repeat(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, 1)
