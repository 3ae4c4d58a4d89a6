"""Ranks: the processes that compute an update together.

An update is written once (`train/learner.py`), and every process runs it on the same trees. The packs of an optimizer step are
divided among them, and their gradients and figures are summed. No mean is taken: each term carries its final weight
(`loss/streams.py`), so the sum over processes is the gradient that a single process would compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from deepgrpo.pack.budget import Pack


class Ranks(Protocol):
    """Collective operations of an update, as one process sees them."""

    def share(self, packs: Sequence[Pack]) -> Sequence[tuple[Pack, bool]]:
        """Packs that this process computes, each with True if it counts.

        A pack that does not count only takes part in the communication; its loss is multiplied by zero.
        """

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this process's loss."""

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over processes; each then holds (its shard of) the sum."""

    def add(self, values: Tensor) -> Tensor:
        """Sum `values` over processes."""


class SingleRank:
    """A single process that computes everything."""

    def share(self, packs: Sequence[Pack]) -> Sequence[tuple[Pack, bool]]:
        return [(pack, True) for pack in packs]

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        pass

    def add(self, values: Tensor) -> Tensor:
        return values


def clip(parameters: Sequence[nn.Parameter], limit: float | None) -> float:
    """Clip a gradient, sharded or not, to a global norm; returns its norm before. None: measure only."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
