"""The weights that the engine computes with: the policy's own, or a copy of them in a coarser dtype."""

from __future__ import annotations

import copy

import torch
from torch import nn

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
            self._copy.model, self._copy.dtype = _converted(self.policy.model, self.dtype), self.dtype
        # at every call and unasked: reading all weights once costs less than a single decoding step, and nobody has to
        # tell the engine who moved them (an optimizer, a checkpoint, a warm start)
        for own, source in zip(self._copy.model.parameters(), self.policy.model.parameters(), strict=True):
            own.copy_(source)
        return self._copy


def _converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A frozen copy whose parameters have another dtype.

    Buffers stay as they are: the frequencies of rotary embeddings lose their positions in bfloat16.
    """
    # parameters are handed to deepcopy ready-made, so that no second float32 copy exists on the way
    ready = {
        id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, dict(ready)).eval()
