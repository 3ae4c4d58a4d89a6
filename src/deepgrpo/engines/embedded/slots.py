"""Key/value slots: one preallocated row per sequence, each with its own length.

`SlotCache` is a transformers cache, so the model's own modules read and write it. In a decoding step row i writes its
new key at position `lengths[i]` of its slot and attends to positions 0..lengths[i]; an additive mask hides the rest.
Rows 0..B-1 are always the active ones: when a row ends, the last one takes its slot. A slot holds either a copy of its
row's prefix and its sampled tokens (`fill`), or the sampled tokens alone, with the prefix read in place (`attach`).

Shapes: B active rows, S slot length, h key/value heads, n tokens of a prefix, d head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, `[max_rows, h, S, d]`."""

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, length = self.owner.max_rows, self.owner.slot_length
        dtype = self.owner.dtype
        self.keys = key_states.new_zeros(rows, key_states.shape[1], length, key_states.shape[3], dtype=dtype)
        # K and V may differ in their head dimension (multi-head latent attention)
        self.values = value_states.new_zeros(rows, value_states.shape[1], length, value_states.shape[3], dtype=dtype)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        rows, lengths, extent = self.owner.rows, self.owner.active_lengths, self.owner.extent
        self.keys[rows, :, lengths] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[rows, :, lengths] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys[: len(rows), :, :extent], self.values[: len(rows), :, :extent]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.extent, 0

    def get_seq_length(self) -> int:
        return self.owner.extent - 1

    def get_max_length(self) -> int:
        return self.owner.slot_length


class SlotCache(Cache):
    """Slots for `max_rows` sequences of at most `slot_length` tokens, stored in `dtype`."""

    def __init__(
        self, num_layers: int, max_rows: int, slot_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.max_rows, self.slot_length, self.dtype = max_rows, slot_length, dtype
        self.lengths = torch.zeros(max_rows, dtype=torch.long, device=device)
        """Tokens in each slot."""
        self.before = torch.zeros(max_rows, dtype=torch.long, device=device)
        """Tokens of the attached prefix, which precede those in the slot."""
        super().__init__(layers=[_SlotLayer(self) for _ in range(num_layers)])
        self.begin_step(0)

    def begin_step(self, active: int) -> None:
        """Select the first `active` rows for the coming forward pass."""
        self.rows = torch.arange(active, device=self.lengths.device)
        self.active_lengths = self.lengths[:active].clone()
        self.extent = int(self.active_lengths.max()) + 1 if active else 0

    @property
    def positions(self) -> Tensor:
        """Position of the token fed to each active row, `[B]`."""
        return self.active_lengths + self.before[: len(self.rows)]

    def end_step(self) -> None:
        self.lengths[: len(self.rows)] += 1

    def fill(self, slots: Tensor, prefix: Prefix) -> None:
        """Copy one encoded prefix into several slots."""
        for layer, (keys, values) in zip(self.layers, prefix.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            assert layer.keys is not None and layer.values is not None
            layer.keys[slots, :, : prefix.length] = keys.to(layer.keys.dtype)
            layer.values[slots, :, : prefix.length] = values.to(layer.values.dtype)
        self.lengths[slots], self.before[slots] = prefix.length, 0

    def attach(self, slots: Tensor, prefix: Prefix) -> None:
        """Start several empty slots after a prefix that is read in place."""
        self.lengths[slots], self.before[slots] = 0, prefix.length

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy whole slots to the slots `target` of rows that ended."""
        extent = int(self.lengths[source].max())
        for layer in self.layers:
            if layer.keys is None or layer.values is None:
                continue  # not yet allocated
            layer.keys[target, :, :extent] = layer.keys[source, :, :extent]
            layer.values[target, :, :extent] = layer.values[source, :, :extent]
        self.lengths[target], self.before[target] = self.lengths[source], self.before[source]

    def last_tokens(self, slot: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values `[h, count, d]` of the newest tokens in a slot, per layer, as views."""
        end = int(self.lengths[slot])
        found: list[tuple[Tensor, Tensor]] = []
        for layer in self.layers:
            assert layer.keys is not None and layer.values is not None
            found.append((layer.keys[slot, :, end - count : end], layer.values[slot, :, end - count : end]))
        return found


class Prefix:
    """Keys and values `[h, n, d]` of one encoded prefix, and the model's output at its last token.

    `last` is the hidden state `[H]` that the output layer takes, or the logits `[V]` for a model without a known head. A prefix
    that goes on from a stored one has that one as its `origin`, and what was encoded behind it as `encoded`.
    """

    def __init__(
        self, layers: list[tuple[Tensor, Tensor]], last: Tensor, origin: Any = None,
        encoded: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        self.layers = layers
        self.last = last
        self.length = layers[0][0].shape[1]
        self.origin, self.encoded = origin, encoded or layers
