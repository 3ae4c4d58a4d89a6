"""Who computes an update: one process alone, or several that hold a part of the work each.

An update is written once (`train/learner.py`) and run by every process on the same trees. The packs of an optimizer step are
shared out; what they yield is summed. No mean is taken anywhere: each term carries its own final weight
(`loss/streams.py`), so the sum over processes is the gradient that one process would have computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from deepgrpo.pack.budget import Pack


class Ranks(Protocol):
    """The processes of an update, as one of them sees them."""

    def share(self, packs: Sequence[Pack]) -> Sequence[tuple[Pack, bool]]:
        """The packs that this process computes, and for each whether it counts.

        One that does not count takes part in the others' communication only; its loss is multiplied by zero.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's loss."""
        ...

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Afterwards every process holds (its part of) the sum of all gradients."""
        ...

    def clip(self, parameters: Sequence[nn.Parameter], limit: float | None) -> float:
        """Scale the gradient down to a global norm of `limit`; returns the norm it had."""
        ...

    def add(self, values: Tensor) -> Tensor:
        """The sum of the processes' `values`, in place."""
        ...


class SingleRank:
    """One process has it all."""

    def share(self, packs: Sequence[Pack]) -> Sequence[tuple[Pack, bool]]:
        return [(pack, True) for pack in packs]

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        pass

    def clip(self, parameters: Sequence[nn.Parameter], limit: float | None) -> float:
        return clip(parameters, limit)

    def add(self, values: Tensor) -> Tensor:
        return values


def clip(parameters: Sequence[nn.Parameter], limit: float | None) -> float:
    """Clip a gradient, sharded or not, to a global norm; returns the norm it had."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
