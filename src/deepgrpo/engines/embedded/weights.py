"""The weights that the engine computes with: the policy's own, or a copy of them in a coarser dtype."""

from __future__ import annotations

import copy

import torch
from torch import nn

from deepgrpo.engines.embedded.packed import PackedLinear, packs
from deepgrpo.model.policy import Policy


class EngineWeights:
    """The policy as the engine sees it.

    In the policy's own float32 that is the policy itself. In bfloat16 it is a copy of its weights, half their size, which
    every matrix product then reads in half the time; it follows the policy at each `current()`.

    Args:
        policy: what is trained.
        dtype: of weights, keys and values in the engine.
    """

    def __init__(self, policy: Policy, dtype: torch.dtype) -> None:
        self.policy, self.dtype = policy, dtype
        self._copy: Policy | None = None

    @property
    def copied(self) -> bool:
        """Whether there is (or will be) a second set of weights."""
        return any(p.dtype != self.dtype for p in self.policy.model.parameters())

    @torch.no_grad()
    def current(self) -> Policy:
        """A policy with the present weights, for no other use than sampling."""
        if not self.copied:
            if self.policy.dtype == self.dtype:
                return self.policy
            plain = copy.copy(self.policy)  # the same model, without the learner's autocast
            plain.dtype = self.dtype
            return plain
        if self._copy is None:
            self._copy = copy.copy(self.policy)
            self._copy.model, self._copy.dtype = _converted(self.policy, self.dtype), self.dtype
            return self._copy
        # at every call and unasked: reading all weights once costs less than a few decoding steps, and nobody has to
        # tell the engine who moved them (an optimizer, a checkpoint, a warm start)
        sources = dict(self.policy.model.named_parameters())
        for name, own in self._copy.model.named_parameters():
            own.copy_(sources[name])
        for module in self._copy.model.modules():
            if isinstance(module, PackedLinear):
                module.refresh()
        return self._copy


def _converted(policy: Policy, dtype: torch.dtype) -> nn.Module:
    """A frozen copy whose parameters have another dtype, its linear layers packed where that works.

    Buffers stay as they are: the frequencies of rotary embeddings lose their positions in bfloat16.
    """
    # parameters are handed to deepcopy ready-made, so that no second float32 copy exists on the way
    ready = {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in policy.model.parameters()}
    plain = copy.deepcopy(policy.model, dict(ready)).eval()
    if packs(policy.device, dtype):
        packed = _packed(plain, policy.model, dtype)
        if _agree(policy, plain, packed):
            return packed
    return plain


def _packed(plain: nn.Module, source: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`plain` with its linear layers replaced; what is not replaced is shared with it."""
    layers = dict(source.named_modules())
    memo: dict[int, object] = {id(p): p for p in plain.parameters()}
    for name, module in plain.named_modules():
        # adapters are asked for their weights by peft, and are too small to be worth it
        if type(module) is nn.Linear and "lora_" not in name:
            layer = layers[name]
            assert isinstance(layer, nn.Linear)
            memo[id(module)] = PackedLinear(layer, dtype)
    return copy.deepcopy(plain, memo)


@torch.no_grad()
def _agree(policy: Policy, plain: nn.Module, packed: nn.Module) -> bool:
    """Whether both say the same of a few tokens: some families look at a layer's weight beside calling it."""
    vocabulary = policy.causal.config.get_text_config().vocab_size
    ids = torch.arange(6, device=policy.device)[None] % vocabulary
    said = []
    for model in (plain, packed):
        trial = copy.copy(policy)
        trial.model = model
        rows = torch.arange(6, device=policy.device)
        try:
            said.append(torch.log_softmax(trial.logits(trial.run(rows, input_ids=ids, use_cache=False)).float(), -1))
        except Exception:  # whatever a model's own code raises: it is left as it was
            return False
    # both round to bfloat16, in another order: they differ by what it rounds, and not by units. The bound is wide, so that the
    # verdict never hangs on the weights: a resumed run has to come to the same one
    return bool((said[0] - said[1]).abs().max() < 0.25 * said[0].abs().max())
