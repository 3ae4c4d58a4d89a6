"""Prefill: encode prefixes in batches of similar length, whole or behind what is known of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from deepgrpo.engines.embedded.masks import path_mask, windows_of
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


Layers = list[tuple[Tensor, Tensor]]


def encode_behind(policy: Policy, known: Sequence[Layers], rests: Sequence[tuple[int, ...]]) -> list[tuple[Layers, Tensor]]:
    """Encode the rest of each prefix behind keys and values `[h, n, d]` of its beginning, in batches of similar length.

    Returns for each, in order, keys and values of the rest, and the model's output at its last token.
    """
    lengths = [layers[0][0].shape[1] + len(rest) for layers, rest in zip(known, rests, strict=True)]
    found: dict[int, tuple[Layers, Tensor]] = {}
    waiting = sorted(range(len(rests)), key=lambda i: lengths[i])
    while waiting:
        count = 1
        while count < len(waiting) and (count + 1) * lengths[waiting[count]] <= PREFILL_TOKENS:
            count += 1
        batch, waiting = waiting[:count], waiting[count:]
        found |= zip(batch, _behind(policy, [known[i] for i in batch], [rests[i] for i in batch]), strict=True)
    return [found[i] for i in range(len(rests))]


def _behind(policy: Policy, known: Sequence[Layers], rests: Sequence[tuple[int, ...]]) -> list[tuple[Layers, Tensor]]:
    """One batch: the known parts are padded on the right to n tokens, and the rests behind them to m."""
    device = policy.device
    before_B = torch.tensor([layers[0][0].shape[1] for layers in known], device=device)
    n, m = int(before_B.max()), max(map(len, rests))
    cache = DynamicCache()
    for index in range(len(known[0])):
        pairs = [layers[index] for layers in known]
        keys, values = (
            torch.stack([torch.nn.functional.pad(pair[i], (0, 0, 0, n - pair[i].shape[1])) for pair in pairs]) for i in (0, 1)
        )
        cache.update(keys, values, index)
    ids_BM = torch.zeros(len(rests), m, dtype=torch.long)
    for row, rest in enumerate(rests):
        ids_BM[row, : len(rest)] = torch.tensor(rest)
    positions_BM = before_B[:, None] + torch.arange(m, device=device)
    # position along the path of every key: padding of the known parts is behind everything
    keys_BK = torch.cat([torch.arange(n, device=device).repeat(len(rests), 1), positions_BM], 1)
    keys_BK[:, :n][keys_BK[:, :n] >= before_B[:, None]] = policy.context + m
    ends = torch.tensor([row * m + len(rest) - 1 for row, rest in enumerate(rests)], device=device)
    output = policy.run(
        ends, input_ids=ids_BM.to(device), position_ids=positions_BM, past_key_values=cache, use_cache=True,
        attention_mask=path_mask(windows_of(policy), positions_BM, keys_BK, policy.dtype),
    )  # fmt: skip
    return [
        (
            [(layer.keys[row, :, n : n + len(rest)].clone(), layer.values[row, :, n : n + len(rest)].clone())
             for layer in cache.layers],
            output[row],
        )
        for row, rest in enumerate(rests)
    ]  # fmt: skip
