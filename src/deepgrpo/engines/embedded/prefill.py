"""Prefill: encode prefixes in batches of similar length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from deepgrpo.engines.embedded.slots import Prefix
from deepgrpo.model.policy import Policy

PREFILL_TOKENS = 16_384
"""Most tokens (padding included) in one prefill pass."""


def encode_prefixes(policy: Policy, prefixes: Sequence[tuple[int, ...]]) -> list[Prefix]:
    """Encode every prefix, in right-padded batches of similar length. Returns them in order."""
    encoded: dict[int, Prefix] = {}
    waiting = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    while waiting:
        count = 1
        while count < len(waiting) and (count + 1) * len(prefixes[waiting[count]]) <= PREFILL_TOKENS:
            count += 1
        batch, waiting = waiting[:count], waiting[count:]
        width = len(prefixes[batch[-1]])
        ids_PT = torch.zeros(len(batch), width, dtype=torch.long)
        for row, i in enumerate(batch):
            ids_PT[row, : len(prefixes[i])] = torch.tensor(prefixes[i])
        # without a config the cache keeps all positions of sliding-window layers too, which branches may need
        cache = DynamicCache()
        ends = torch.tensor([row * width + len(prefixes[i]) - 1 for row, i in enumerate(batch)])
        output = policy.run(
            ends.to(policy.device), input_ids=ids_PT.to(policy.device), past_key_values=cache, use_cache=True
        )
        for row, i in enumerate(batch):
            length = len(prefixes[i])
            # contiguous copies, so that a stored prefix does not hold the padding of its batch
            layers = [
                (layer.keys[row, :, :length].contiguous(), layer.values[row, :, :length].contiguous())
                for layer in cache.layers
            ]
            encoded[i] = Prefix(layers, output[row])
    return [encoded[i] for i in range(len(prefixes))]
