"""Test of a model: can it be decoded from slots, can rows read an attached prefix, can a known prefix be extended?

A config does not tell: some families carry a state besides their keys, share keys between layers, change keys between
cache and attention, derive positions from the shape of the batch, or ignore the cache they are given. So the model decodes
a few rows of unequal length in float32, as the engine would, and its log-probs must match those without a cache.

Shapes: P rows of the trial, B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from deepgrpo.engines.embedded.masks import decoding_mask, windows_of
from deepgrpo.engines.embedded.prefill import encode_behind, encode_prefixes
from deepgrpo.engines.embedded.slots import Prefix, SlotCache
from deepgrpo.errors import first_line
from deepgrpo.model import tree_attention
from deepgrpo.model.decode_attention import DecodePlan, SharedPrefix
from deepgrpo.model.logprobs import distance
from deepgrpo.model.policy import Policy
from deepgrpo.model.tree_gate import TOLERANCE

_STEPS = 2
"""Decoding steps of the trial."""

_LONGEST_WINDOW = {"cpu": 1024}
"""Longest window that the trial exceeds; 4,096 on other devices. Longer windows are trusted as configured."""


def slot_objection(policy: Policy) -> str | None:
    """Reason why the policy's model cannot be decoded from slots, as a clause after its name; None if it can.

    The policy must have float32 weights.
    """
    config = policy.causal.config
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder"
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"has layers of type {', '.join(sorted(kinds))}"
    return _trial_objection(policy, attach=False)


def can_attach(policy: Policy) -> bool:
    """Test whether rows may read an attached prefix through `decode_attention` instead of a copy in their slots.

    This requires that every layer attends through our function and has no window. The policy must have float32 weights.
    """
    ours = policy.verdict.packs and policy.causal.config._attn_implementation == tree_attention.NAME
    if not ours or set(windows_of(policy).values()) != {None}:
        return False
    return _trial_objection(policy, attach=True) is None


def can_extend(policy: Policy) -> bool:
    """Test whether several tokens can be encoded behind keys and values that are known. The policy must decode from slots."""
    training = policy.model.training
    policy.model.eval()
    try:
        return _extends(policy, trial_lengths(policy))
    except Exception:  # a model's own code may raise anything
        return False
    finally:
        policy.model.train(training)


@torch.no_grad()
def _extends(policy: Policy, lengths: Sequence[int]) -> bool:
    rows = trial_tokens(policy, len(lengths), max(lengths) + 2 + len(lengths)).tolist()
    rests = [tuple(row[n : n + 2 + i]) for i, (row, n) in enumerate(zip(rows, lengths, strict=True))]
    known = encode_prefixes(policy, [tuple(row[:n]) for row, n in zip(rows, lengths, strict=True)])
    for row, n, rest, (_, output) in zip(
        rows, lengths, rests, encode_behind(policy, [each.layers for each in known], rests), strict=True
    ):
        path = torch.tensor(row[: n + len(rest)], device=policy.device)
        both = policy.logits(output[None]), uncached_logits(policy, path, 1)
        said, expected = (torch.log_softmax(each.float(), -1) for each in both)
        if not float(distance(said, expected)) < TOLERANCE:  # also for NaN
            return False
    return True


def _trial_objection(policy: Policy, *, attach: bool) -> str | None:
    training = policy.model.training
    policy.model.eval()
    try:
        return _trial(policy, trial_lengths(policy), attach)
    except Exception as error:  # a model's own code may raise anything; it cannot be decoded this way
        return f"raised an error when it was tried ({in_short(error)})"
    finally:
        policy.model.train(training)


def trial_lengths(policy: Policy) -> tuple[int, ...]:
    """Prefix lengths of the trial's rows: two short ones, and two that exceed the sliding window if there is one."""
    config = policy.causal.config.get_text_config()
    longest = min(_LONGEST_WINDOW.get(policy.device.type, 4096), policy.context - _STEPS - 7)
    # any key with "window" in its name: some families apply their window themselves and ignore our mask
    found = [value for name, value in config.to_dict().items() if "window" in name and type(value) is int]
    windows = [w for w in found if 1 < w <= longest]
    return (5, 9, *((max(windows) + 2, max(windows) + 7) if windows else ()))


def trial_tokens(policy: Policy, rows: int, length: int) -> Tensor:
    """The same `[rows, length]` tokens at every call."""
    vocabulary = min(policy.causal.config.get_text_config().vocab_size, 1000)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (rows, length), generator=generator)


@torch.no_grad()
def _trial(policy: Policy, lengths: Sequence[int], attach: bool) -> str | None:
    """Decode rows of these prefix lengths and compare with forward passes without a cache.

    With `attach` every second row has its prefix attached, so that its slot holds decoded tokens only.
    """
    device, layers = policy.device, policy.causal.config.get_text_config().num_hidden_layers
    rows, width = len(lengths), max(lengths)
    ids_PT = trial_tokens(policy, rows, width + _STEPS).to(device)
    expected = torch.stack(
        [uncached_logits(policy, ids_T[: n + _STEPS], 1 + _STEPS) for ids_T, n in zip(ids_PT, lengths, strict=True)]
    )

    filled = DynamicCache()
    ends = torch.tensor([i * width + n - 1 for i, n in enumerate(lengths)], device=device)
    output = policy.run(ends, input_ids=ids_PT[:, :width], past_key_values=filled, use_cache=True)
    if len(filled.layers) != layers:
        return f"fills {len(filled.layers)} of its {layers} layers when given an empty cache"
    for index, layer in enumerate(filled.layers):
        for states in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            shape = tuple(states.shape) if isinstance(states, Tensor) else None
            if shape is None or len(shape) != 4 or (shape[0], shape[2]) != (rows, width):
                return f"does not keep one key and value per token in layer {index}"
    got = [policy.logits(output)]

    cache = SlotCache(layers, rows, width + _STEPS, device, torch.float32)
    groups: list[SharedPrefix] = []
    for i, n in enumerate(lengths):
        views = [(layer.keys[i, :, :n], layer.values[i, :, :n]) for layer in filled.layers]
        slot = torch.tensor([i], device=device)
        if attach and i % 2:
            cache.attach(slot, Prefix(views, output[i]))
            groups.append(SharedPrefix(slot, views))
        else:
            cache.fill(slot, Prefix(views, output[i]))
    plan = {"decode_plan": DecodePlan(tuple(groups))} if attach else {}
    windows = windows_of(policy)
    for _ in range(_STEPS):
        cache.begin_step(rows)
        output = policy.run(
            cache.rows,
            input_ids=ids_PT.gather(1, cache.positions[:, None]),
            position_ids=cache.positions[:, None],
            attention_mask=decoding_mask(windows, cache.active_lengths, cache.extent, torch.float32),
            past_key_values=cache,
            use_cache=True,
            **plan,
        )
        got.append(policy.logits(output))
        cache.end_step()
    said = torch.log_softmax(torch.stack(got, 1).float(), -1)
    worst = float(distance(said, torch.log_softmax(expected.float(), -1)))
    if worst < TOLERANCE:  # false for NaN
        return None
    return f"says something else when it decodes from slots: log-probs differ by {worst:.1e}"


@torch.no_grad()
def uncached_logits(policy: Policy, ids_T: Tensor, count: int) -> Tensor:
    """Logits `[count, V]` at the last tokens of one row, from a forward pass without a cache."""
    last = torch.arange(len(ids_T) - count, len(ids_T), device=ids_T.device)
    return policy.logits(policy.run(last, input_ids=ids_T[None], use_cache=False))


def in_short(error: Exception) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {first_line(error, 120)}"
