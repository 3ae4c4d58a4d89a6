"""Forward context influence: how much the later steps of a text attend to each step.

    a(i, j)     attention of token i to token j, in one head of one layer
    A(q, k)     its mean over the tokens i of step q and j of step k
    FCI(k)      max over layers and heads of Σ A(q, k) over the steps q ≥ k + lag

The definition is AttnRL's (arXiv:2509.26628): the mean over pairs of tokens, as in its released code, and the maximum after
the sum, so that a single head must attend to the step throughout. It takes a forward pass with the model's eager attention,
the only implementation that returns its weights. Each layer is reduced as it is computed, so that the weights
`[B, H, T, T]` of only one layer are in memory.

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
from deepgrpo.model.shape import shape_of

MOST_WEIGHTS = 2**24
"""Attention weights of a layer in memory at a time (64 MiB in float32), unless a single path has more."""


@dataclass(frozen=True, slots=True)
class Steps:
    """A path and its steps.

    Example: Steps(tokens=prompt + response, bounds=(3, 7, 9)) has the steps [3, 7) and [7, 9) after a prompt of 3.
    """

    tokens: tuple[int, ...]
    bounds: tuple[int, ...]
    """Start of the first step, then the end of each step; ascending."""


@torch.no_grad()
def attention_influence(policy: Policy, paths: Sequence[Steps], lag: int) -> list[np.ndarray]:
    """FCI of each step of each path.

    Args:
        lag: distance in steps from which on a step counts as later; at least 1.

    Returns:
        one `[m]` float64 array per path, in order; 0 for the last `lag` steps of a path.

    Raises:
        ModelError: the model does not return attention weights.
    """
    found: list[np.ndarray] = [np.zeros(len(path.bounds) - 1) for path in paths]
    # paths without a later step need no forward pass
    wanted = sorted((i for i, path in enumerate(paths) if len(path.bounds) - 1 > lag), key=lambda i: len(paths[i].tokens))
    if not wanted:
        return found
    heads = max(1, shape_of(policy.causal.config).heads)
    with _reduced_attention(policy) as set_reduction:
        for batch in batch_by_length(wanted, [len(path.tokens) for path in paths], heads):
            longest = max(len(paths[i].tokens) for i in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long, device=policy.device)
            for row, i in enumerate(batch):
                ids[row, : len(paths[i].tokens)] = torch.tensor(paths[i].tokens)
            reduction = InfluenceReduction([paths[i] for i in batch], longest, lag, policy.device)
            set_reduction(reduction)
            with policy.autocast():
                # right-padded: causal attention hides the padding from every token of a path
                policy.causal.base_model(input_ids=ids, use_cache=False)
            _require_layers(policy, reduction)
            for i, influence in zip(batch, reduction.influence, strict=True):
                found[i] = influence.double().cpu().numpy()
    return found


@torch.no_grad()
def check_attention(policy: Policy) -> None:
    """Forward three tokens to check that `attention_influence` can work. A meta policy is sufficient.

    Raises ModelError if the model does not return attention weights.
    """
    token = policy.eos_ids[0]
    with _reduced_attention(policy) as set_reduction:
        reduction = InfluenceReduction([Steps((token,) * 3, (1, 2, 3))], 3, 1, policy.device)
        set_reduction(reduction)
        ids = torch.full((1, 3), token, device=policy.device)
        # given a mask, transformers does not read values to decide whether it needs one; meta tensors have none
        try:
            policy.causal.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except Exception:  # a model's own code may fail without values: undecided until it has weights
            if policy.device.type == "meta":
                return
            raise
    _require_layers(policy, reduction)


def _require_layers(policy: Policy, reduction: InfluenceReduction) -> None:
    if not reduction.layers:
        raise ModelError(
            f"the attention of this model ({policy.causal.config.model_type}) cannot be read: none of its layers "
            'gave weights under attn_implementation = "eager"; choose an explore.type that needs none, such as '
            '"deep" or "treerl"'
        )


def forwarded_tokens(paths: Sequence[Steps], lag: int) -> int:
    """Number of tokens that `attention_influence` forwards for these paths."""
    return sum(len(path.tokens) for path in paths if len(path.bounds) - 1 > lag)


class InfluenceReduction:
    """Running maximum of the influence over layers and heads."""

    def __init__(self, paths: Sequence[Steps], length: int, lag: int, device: torch.device) -> None:
        self.length, self.layers = length, 0
        self.means: list[Tensor] = []
        """Averaging weights per path, `[m, T]`: row k averages over the tokens of step k."""
        self.later: list[Tensor] = []
        """Selection per path, `[m, m]`: 1 where step q (row) counts for step k (column)."""
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
        """Update with the attention weights of one layer."""
        self.layers += 1
        for row, (mean, later) in enumerate(zip(self.means, self.later, strict=True)):
            between = mean @ weights_BHTT[row].float() @ mean.T
            self.influence[row] = torch.maximum(self.influence[row], (between * later).sum(-2).amax(0))


@contextlib.contextmanager
def _reduced_attention(policy: Policy) -> Iterator[Any]:
    """Run the model with eager attention, and pass each layer's weights to the current reduction.

    Yields the function that sets the current reduction. On exit the model's attention implementation, mode and outputs are
    restored.
    """
    causal = policy.causal
    before, training = causal.config._attn_implementation, causal.training
    current: list[InfluenceReduction] = []

    def take_weights(module: nn.Module, args: Any, output: Any) -> Any:
        """Take the weights out of an attention layer's result (hidden states, weights, ...), so that they can be freed."""
        if not current or not isinstance(output, tuple) or len(output) < 2:
            return None
        weights, length = output[1], current[0].length
        if not isinstance(weights, Tensor) or weights.ndim != 4 or weights.shape[-2:] != (length, length):
            return None
        current[0].take(weights)
        return (output[0], None, *output[2:])

    def set_current(reduction: InfluenceReduction) -> None:
        current[:] = [reduction]

    hooks = [module.register_forward_hook(take_weights) for module in causal.modules()]
    try:
        causal.eval()
        causal.set_attn_implementation("eager")
        yield set_current
    finally:
        for hook in hooks:
            hook.remove()
        causal.set_attn_implementation(before)
        causal.train(training)


def batch_by_length(order: Sequence[int], lengths: Sequence[int], heads: int) -> Iterator[list[int]]:
    """Consecutive batches of ascending lengths with at most MOST_WEIGHTS attention weights per layer."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * heads * lengths[i] ** 2 > MOST_WEIGHTS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
