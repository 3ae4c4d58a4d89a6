"""Weights of the embedded engine: the policy's own, or a copy in a coarser dtype."""

from __future__ import annotations

import copy

import torch
from torch import nn

from deepgrpo.engines.embedded.packed import PackedLinear, supports_packing
from deepgrpo.model.logprobs import distance
from deepgrpo.model.narrow import plain_again
from deepgrpo.model.policy import Policy


class EngineWeights:
    """The policy in the engine's dtype.

    In float32 it is the policy itself. In bfloat16 it is a copy at half the size, which every matrix product reads in half
    the time; `current()` updates it from the policy.

    Args:
        policy: the trained policy.
        dtype: dtype of weights, keys and values in the engine.
    """

    def __init__(self, policy: Policy, dtype: torch.dtype) -> None:
        self.policy, self.dtype = policy, dtype
        self._copy: Policy | None = None

    @property
    def copied(self) -> bool:
        """True if the engine holds a second set of weights."""
        if self.policy.narrow and self.dtype == torch.float32:
            return False  # its arithmetic is float32
        return any(p.dtype != self.dtype for p in self.policy.model.parameters())

    @torch.no_grad()
    def current(self) -> Policy:
        """A policy with the current weights, for sampling only."""
        if not self.copied:
            if self.policy.dtype == self.dtype:
                return self.policy
            plain = copy.copy(self.policy)  # the same model, without the learner's autocast
            plain.dtype = self.dtype
            return plain
        if self._copy is None:
            self._copy = copy.copy(self.policy)
            self._copy.model, self._copy.dtype = _converted(self.policy, self.dtype), self.dtype
            self._copy.narrow = False
            return self._copy
        # copied at every call: reading all weights once costs less than a few decoding steps, and no caller (optimizer,
        # checkpoint, warm start) has to announce a change
        sources = dict(self.policy.model.named_parameters())
        for name, own in self._copy.model.named_parameters():
            if own.data_ptr() != sources[name].data_ptr():
                own.copy_(sources[name])
        for module in self._copy.model.modules():
            if isinstance(module, PackedLinear):
                module.refresh()
        return self._copy


def _converted(policy: Policy, dtype: torch.dtype) -> nn.Module:
    """A frozen copy in another dtype, with packed linear layers where they work. Frozen matrices of that dtype are shared.

    Buffers keep their dtype: rotary frequencies in bfloat16 would give wrong positions.
    """
    # deepcopy gets converted parameters through its memo, so that no second float32 copy exists meanwhile
    ready = {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in policy.model.parameters()}
    plain = copy.deepcopy(policy.model, dict(ready)).eval()
    plain_again(plain)
    if supports_packing(policy.device, dtype):
        packed = _packed(plain, policy.model, dtype)
        if _agree(policy, plain, packed):
            return packed
    return plain


def _packed(plain: nn.Module, source: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`plain` with packed linear layers; all other weights are shared with it."""
    layers = dict(source.named_modules())
    memo: dict[int, object] = {id(p): p for p in plain.parameters()}
    for name, module in plain.named_modules():
        # peft reads the weights of adapters directly, and they are too small to gain from packing
        if type(module) is nn.Linear and "lora_" not in name:
            layer = layers[name]
            assert isinstance(layer, nn.Linear)
            memo[id(module)] = PackedLinear(layer, dtype)
    return copy.deepcopy(plain, memo)


@torch.no_grad()
def _agree(policy: Policy, plain: nn.Module, packed: nn.Module) -> bool:
    """Compare both on a few tokens: some families read a layer's weight directly instead of calling the layer."""
    vocabulary = policy.causal.config.get_text_config().vocab_size
    ids = torch.arange(6, device=policy.device)[None] % vocabulary
    said = []
    for model in (plain, packed):
        trial = copy.copy(policy)
        trial.model = model
        rows = torch.arange(6, device=policy.device)
        try:
            said.append(torch.log_softmax(trial.logits(trial.run(rows, input_ids=ids, use_cache=False)).float(), -1))
        except Exception:  # a model's own code may raise anything; keep the plain copy
            return False
    # both round to bfloat16, in different order. The bound is wide, so that the outcome does not depend on the weights:
    # a resumed run must reach the same one
    return bool(distance(*said) < 0.25 * said[0].abs().where(said[0].isfinite(), 0.0).max())
