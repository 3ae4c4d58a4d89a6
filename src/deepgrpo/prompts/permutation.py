"""A random order of n rows that is computed by address: the row at any place, without a list of n numbers.

A Feistel network over the smallest even number of bits that holds n - 1 is a permutation of that range; a result that is not
below n goes through it again (cycle walking), which makes it one of 0 .. n - 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deepgrpo import rng

_ROUNDS = 6


class Permutation:
    """A permutation of 0 .. size - 1, given by an address such as (seed, "shuffle", epoch).

    >>> sorted(Permutation(5, 0, "shuffle", 0)(range(5)))
    [0, 1, 2, 3, 4]
    """

    def __init__(self, size: int, *address: int | str) -> None:
        self.size = size
        self._half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = [np.uint64(rng.key(*address, number)) for number in range(_ROUNDS)]

    def __call__(self, places: range | list[int]) -> list[int]:
        """The rows at some places."""
        found = self._network(np.asarray(places, dtype=np.uint64))
        while (outside := found >= self.size).any():
            found[outside] = self._network(found[outside])
        return [int(each) for each in found]

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & self._mask)
        return (left << self._half) | right


def _mixed(x: Any) -> Any:
    """The finalizer of splitmix64: every bit of the result depends on every bit of x."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
