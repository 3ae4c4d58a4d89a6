"""Attention of a decoding step in which several rows read one copy of the prefix that they share.

Each row has the keys of its own tokens in its slot. The keys of a shared prefix are read once for all its rows, as one
matrix product of many queries, and the two parts are merged by log-sum-exp (cascade attention, as in Hydragen,
arXiv:2402.05099). Without sharing, every slot would hold a copy of the prefix and every row would read its own.

`tree_attention.attention_forward` calls it in a forward pass with a `decode_plan`.

Shapes: B rows, K rows of one group, H query heads, h key/value heads, r = H/h, E slot extent, P prefix, d head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Rows of a decoding step that continue the same prefix."""

    rows_K: Tensor
    layers: Sequence[tuple[Tensor, Tensor]]
    """`[h, P, d]` keys and values of each layer."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Groups of rows that share a prefix in this step. A row outside every group has all its keys in its slot."""

    groups: tuple[SharedPrefix, ...]


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, plan: DecodePlan, layer: int, scale: float
) -> Tensor:
    """Attention of one query per row over its shared prefix and its slot.

    Args:
        query: `[B, H, 1, d]`.
        key, value: `[B, h, E, d]` slots; every row has at least one visible key there, its own.
        mask: additive `[B, 1, 1, E]` for the slots.
        layer: index into the layers of the shared prefixes.

    Returns:
        `[B, H, 1, d]`.
    """
    rows, heads, _, width = query.shape
    groups = key.shape[1]
    # the r query heads of a key head become r queries: each key is read once for them
    query_BhRd = query.reshape(rows, groups, heads // groups, width)
    own_BhRd, own_lse_BhR = _attend(query_BhRd, key, value, mask, scale)
    shared_BhRd = torch.zeros_like(own_BhRd)
    shared_lse_BhR = torch.full_like(own_lse_BhR, -torch.inf)
    for group in plan.groups:
        keys, values = group.layers[layer]
        count = len(group.rows_K)
        packed = query_BhRd[group.rows_K].transpose(0, 1).reshape(1, groups, -1, width)
        part, part_lse = _attend(packed, keys[None], values[None], None, scale)
        shared_BhRd[group.rows_K] = part.view(groups, count, -1, part.shape[-1]).transpose(0, 1)
        shared_lse_BhR[group.rows_K] = part_lse.view(groups, count, -1).transpose(0, 1)
    merged_BhR = torch.logaddexp(own_lse_BhR, shared_lse_BhR)
    result = own_BhRd.float() * (own_lse_BhR - merged_BhR).exp_()[..., None]
    result.addcmul_(shared_BhRd.float(), (shared_lse_BhR - merged_BhR).exp_()[..., None])
    return result.to(query.dtype).view(rows, heads, 1, -1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention `[B, h, n, d]` and its log-sum-exp `[B, h, n]` (float32)."""
    if query.device.type == "cpu" and key.shape[-1] == value.shape[-1]:  # required by the kernel
        if mask is not None:
            mask = mask.expand(-1, -1, query.shape[2], -1)
        out, lse = _flash(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
        return out, lse
    return _attend_by_products(query, key, value, mask, scale)


def _attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`_attend` without a kernel that returns its log-sum-exp: on GPUs, and for values of another width than the keys."""
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, -1)
    return (scores - lse[..., None]).exp_().to(value.dtype) @ value, lse
