"""Attention masks of the embedded engine: what a row sees of its own path, by the windows of the model's layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepgrpo.model.policy import Policy


def windows_of(policy: Policy) -> dict[str, int | None]:
    """Sliding window of each layer type (None: full attention), keyed as the model's masks are."""
    config = policy.causal.config.get_text_config()
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return {"full_attention": window if getattr(config, "use_sliding_window", True) else None}
    if set(kinds) == {"full_attention"}:
        return {"full_attention": None}
    return {kind: window if kind != "full_attention" else None for kind in dict.fromkeys(kinds)}


def decoding_mask(windows: dict[str, int | None], lengths_B: Tensor, extent: int, dtype: torch.dtype) -> Any:
    """Additive `[B, 1, 1, extent]` mask that hides positions beyond a row's own length (or before its window).

    Returns one tensor, or a dict with one per layer type where they differ, as the model's forward takes them.
    """
    positions = torch.arange(extent, device=lengths_B.device)[None]
    return path_mask(windows, lengths_B[:, None], positions, dtype)


def path_mask(windows: dict[str, int | None], queries_BM: Tensor, keys_BK: Tensor, dtype: torch.dtype) -> Any:
    """Additive `[B, 1, M, K]` mask that shows a query the keys up to its own position (and within its window).

    Args:
        queries_BM, keys_BK: positions along the path; one row of keys may stand for all.

    Returns one tensor, or a dict with one per layer type where they differ, as the model's forward takes them.
    """
    queries, keys = queries_BM[:, :, None], keys_BK[:, None]

    def additive(visible: Tensor) -> Tensor:
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]

    past = keys <= queries
    masks = {kind: additive(past & (keys > queries - w) if w else past) for kind, w in windows.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))
