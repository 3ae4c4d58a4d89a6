"""How much the later steps of a text attend to each step: what the policy can tell of a rollout besides its log-probs.

    a(i, j)     attention of token i to token j, in one head of one layer
    A(q, k)     its mean over the tokens i of step q and j of step k
    FCI(k)      max over layers and heads of Σ A(q, k) over the steps q ≥ k + lag

This is the forward context influence of AttnRL (arXiv:2509.26628): mean over pairs of tokens, as in its released code, and
the maximum taken after the sum, so that one head has to look back all along. It takes a forward pass with the model's
own eager attention, the one implementation that hands out its weights. They are reduced layer by layer as they come, so
what is held is `[B, H, T, T]` of one layer, never of all.

Shapes: B paths, H heads, T tokens of the longest path, m steps of a path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepgrpo.errors import ModelError
from deepgrpo.model.policy import Policy

MOST_WEIGHTS = 2**24
"""Attention weights of a layer that exist at a time (64 MiB in float32), unless a single path has more."""


@dataclass(frozen=True, slots=True)
class Steps:
    """A path and its steps.

    Example: Steps(tokens=prompt + response, bounds=(3, 7, 9)) has the steps [3, 7) and [7, 9) behind a prompt of 3.
    """

    tokens: tuple[int, ...]
    bounds: tuple[int, ...]
    """Ascending; where the first step begins, and where each one ends."""


@torch.no_grad()
def attention_influence(policy: Policy, paths: Sequence[Steps], lag: int) -> list[np.ndarray]:
    """FCI of each step of each path.

    Args:
        lag: a step counts as later if it is at least this many steps further on; at least 1.

    Returns:
        one `[m]` float64 array per path, in order; the last `lag` steps of a path have 0.

    Raises:
        ModelError: the model shows no attention weights.
    """
    found: list[np.ndarray] = [np.zeros(len(path.bounds) - 1) for path in paths]
    # what has no step far enough behind another is 0 without asking
    asked = sorted((i for i, path in enumerate(paths) if len(path.bounds) - 1 > lag), key=lambda i: len(paths[i].tokens))
    if not asked:
        return found
    heads = int(getattr(policy.causal.config.get_text_config(), "num_attention_heads", 1))
    with _showing_attention(policy) as reduce_with:
        for batch in _batches(asked, [len(path.tokens) for path in paths], heads):
            longest = max(len(paths[i].tokens) for i in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long, device=policy.device)
            for row, i in enumerate(batch):
                ids[row, : len(paths[i].tokens)] = torch.tensor(paths[i].tokens)
            reduction = _Reduction([paths[i] for i in batch], longest, lag, policy.device)
            reduce_with(reduction)
            with policy.autocast():
                # right-padded: under causal attention no token of a path sees the padding behind it
                policy.causal.base_model(input_ids=ids, use_cache=False)
            _require_layers(policy, reduction)
            for i, influence in zip(batch, reduction.influence, strict=True):
                found[i] = influence.double().cpu().numpy()
    return found


@torch.no_grad()
def check_attention(policy: Policy) -> None:
    """Forward three tokens to see whether `attention_influence` can work; a policy without weights (outline.py) will do.

    Raises ModelError: the model shows no attention weights.
    """
    token = policy.eos_ids[0]
    with _showing_attention(policy) as reduce_with:
        reduction = _Reduction([Steps((token,) * 3, (1, 2, 3))], 3, 1, policy.device)
        reduce_with(reduction)
        ids = torch.full((1, 3), token, device=policy.device)
        # with a mask transformers does not look at values to see whether it needs one, and meta tensors have none
        try:
            policy.causal.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except Exception:  # whatever a model's own code raises where there are no values: only weights can tell
            if policy.device.type == "meta":
                return
            raise
    _require_layers(policy, reduction)


def _require_layers(policy: Policy, reduction: _Reduction) -> None:
    if not reduction.layers:
        raise ModelError(
            f"the attention of this model ({policy.causal.config.model_type}) cannot be read: none of its layers "
            'gave weights under attn_implementation = "eager"; choose an explore.type that needs none, such as '
            '"deep" or "treerl"'
        )


def forwarded_tokens(paths: Sequence[Steps], lag: int) -> int:
    """Tokens that `attention_influence` forwards for these paths."""
    return sum(len(path.tokens) for path in paths if len(path.bounds) - 1 > lag)


class _Reduction:
    """Keeps the largest influence over the layers and heads seen so far."""

    def __init__(self, paths: Sequence[Steps], length: int, lag: int, device: torch.device) -> None:
        self.length, self.layers = length, 0
        self.means: list[Tensor] = []
        """Per path `[m, T]`: row k averages over the tokens of step k."""
        self.later: list[Tensor] = []
        """Per path `[m, m]`: 1 where step q (row) counts for step k (column)."""
        for path in paths:
            steps = len(path.bounds) - 1
            mean = torch.zeros(steps, length)
            for k in range(steps):
                start, end = path.bounds[k], path.bounds[k + 1]
                mean[k, start:end] = 1.0 / (end - start)
            self.means.append(mean.to(device))
            self.later.append(torch.ones(steps, steps).tril(-lag).to(device))
        self.influence = [torch.zeros(len(path.bounds) - 1, device=device) for path in paths]

    def take(self, weights_BHTT: Tensor) -> None:
        """One layer."""
        self.layers += 1
        for row, (mean, later) in enumerate(zip(self.means, self.later, strict=True)):
            between = mean @ weights_BHTT[row].float() @ mean.T
            self.influence[row] = torch.maximum(self.influence[row], (between * later).sum(-2).amax(0))


@contextlib.contextmanager
def _showing_attention(policy: Policy) -> Iterator[Any]:
    """Inside, the model attends eagerly, and each layer's weights go to the reduction that was handed in last.

    Yields the function to hand it in with. The implementation, the mode and the outputs of the model are as before
    afterwards.
    """
    causal = policy.causal
    before, training = causal.config._attn_implementation, causal.training
    current: list[_Reduction] = []

    def look(module: nn.Module, args: Any, output: Any) -> Any:
        """Attention layers return (hidden states, weights, ...); the weights are taken out, so that nobody keeps them."""
        if not current or not isinstance(output, tuple) or len(output) < 2:
            return None
        weights, length = output[1], current[0].length
        if not isinstance(weights, Tensor) or weights.ndim != 4 or weights.shape[-2:] != (length, length):
            return None
        current[0].take(weights)
        return (output[0], None, *output[2:])

    def hand_in(reduction: _Reduction) -> None:
        current[:] = [reduction]

    hooks = [module.register_forward_hook(look) for module in causal.modules()]
    try:
        causal.eval()
        causal.set_attn_implementation("eager")
        yield hand_in
    finally:
        for hook in hooks:
            hook.remove()
        causal.set_attn_implementation(before)
        causal.train(training)


def _batches(order: Sequence[int], lengths: Sequence[int], heads: int) -> Iterator[list[int]]:
    """Neighbours in ascending length, as many as have no more than MOST_WEIGHTS weights in a layer."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * heads * lengths[i] ** 2 > MOST_WEIGHTS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
