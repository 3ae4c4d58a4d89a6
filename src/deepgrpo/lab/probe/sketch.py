"""Random projection of a gradient to a few thousand numbers, one parameter at a time.

    parameter ─► random signs ─► cut into rows of K ─► each row turned by a random shift ─► summed into K numbers

This is a count sketch (Charikar, Chen, Farach-Colton 2002): every coordinate has a random sign and a random one of K places.
Two coordinates share a place with probability at most 1/K, because rows are turned independently and a row never meets itself.
Inner products are kept on average, and the error of <Sg, Sh> is at most sqrt((|g|²|h|² + <g, h>²) / K) (one standard
deviation): with K = 16,384 the cosine of any two gradients is off by .008.

Signs and shifts follow from the seed and the parameter's name. They are drawn anew each time, so nothing but the K numbers
and a block of one parameter is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from deepgrpo import rng
from deepgrpo.model.policy import Policy

BLOCK = 2**22
"""Coordinates that are projected at once."""
_SIGNS = torch.tensor([[1.0 - 2.0 * (byte >> bit & 1) for bit in range(8)] for byte in range(256)])
"""`[256, 8]` signs of a random byte's bits."""


@dataclass
class Sketch:
    """A seeded projection to `size` numbers."""

    size: int
    seed: int
    _table: Tensor = field(default_factory=lambda: _SIGNS, repr=False)

    def project(self, name: str, gradient: Tensor) -> np.ndarray:
        """`[size]` float64 projection of one parameter's gradient."""
        flat, size = gradient.detach().reshape(-1), self.size
        rows = math.ceil(flat.numel() / size)
        random = rng.generator(self.seed, "sketch", name)
        shifts = random.integers(size, size=rows)
        self._table = self._table.to(flat.device)
        total = torch.zeros(size, dtype=torch.float64, device=flat.device)
        at_once = max(1, BLOCK // size)
        for first in range(0, rows, at_once):
            block = flat[first * size : (first + at_once) * size].float()
            taken = math.ceil(block.numel() / size)
            signs = torch.from_numpy(np.frombuffer(random.bytes(taken * math.ceil(size / 8)), dtype=np.uint8).copy())
            signed = self._table[signs.to(flat.device).int()].reshape(taken, -1)[:, :size].reshape(-1)
            signed[: block.numel()] *= block
            signed[block.numel() :] = 0.0
            total += _turned(signed.view(taken, size), shifts[first : first + taken])
        return total.cpu().numpy()

    def empty(self, policy: Policy) -> np.ndarray:
        return np.zeros(self.size)


@dataclass
class Whole:
    """No projection: the gradient itself, parameter after parameter. For tiny models."""

    offsets: dict[str, int] = field(default_factory=dict)
    size: int = 0

    def empty(self, policy: Policy) -> np.ndarray:
        self.offsets, self.size = {}, 0
        for name, parameter in policy.trainable().items():
            self.offsets[name] = self.size
            self.size += parameter.numel()
        return np.zeros(self.size)

    def project(self, name: str, gradient: Tensor) -> np.ndarray:
        found = np.zeros(self.size)
        begin = self.offsets[name]
        found[begin : begin + gradient.numel()] = gradient.detach().reshape(-1).double().cpu().numpy()
        return found


def _turned(rows: Tensor, shifts: np.ndarray) -> Tensor:
    """Sum of rows `[n, K]`, each turned by its shift."""
    size = rows.shape[1]
    if rows.device.type != "cpu":  # one gather instead of a kernel per row
        place = (torch.arange(size, device=rows.device) - torch.from_numpy(shifts).to(rows.device)[:, None]) % size
        return rows.gather(1, place).double().sum(dim=0)
    total = torch.zeros(2 * size, dtype=torch.float64)
    for row, shift in zip(rows, shifts.tolist(), strict=True):
        total[shift : shift + size] += row
    return total[:size] + total[size:]


@contextmanager
def collected(policy: Policy, projection: Sketch | Whole) -> Iterator[np.ndarray]:
    """Add the projected gradient of every backward pass inside the block to the array that is yielded.

    A parameter's gradient is projected and freed as soon as it is complete, so no whole gradient is ever in memory.
    """
    total = projection.empty(policy)

    def watch(name: str, parameter: torch.nn.Parameter) -> object:
        def taken(of: Tensor) -> None:
            assert of.grad is not None
            np.add(total, projection.project(name, of.grad), out=total)
            of.grad = None

        return parameter.register_post_accumulate_grad_hook(taken)

    handles = [watch(name, parameter) for name, parameter in policy.trainable().items()]
    try:
        for parameter in policy.trainable().values():
            parameter.grad = None
        yield total
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
        for parameter in policy.trainable().values():
            parameter.grad = None
