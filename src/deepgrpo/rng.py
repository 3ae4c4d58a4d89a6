"""Counter-based random streams: a draw depends on its address, never on earlier draws.

A *key* is a 64-bit hash of an address such as (seed, step, prompt, node). The t-th uniform of a key is a pure function
of (key, t). A row therefore draws the same tokens in any batch, after a resume, and on any worker. The mixer is
SplitMix64 (Steele, Lea, Flood 2014); driven by a counter, it passes BigCrush.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MANTISSA = np.float64(2.0**-53)


def key(*address: int | str) -> int:
    """Hash an address to a 64-bit key.

    Args:
        address: parts of the address, e.g. `(seed, step, prompt.id, node)`. The type counts: `1` and `"1"` are
            different addresses.

    Returns:
        an integer in [0, 2^64), equal on every machine and Python version.

    >>> key(0, 1, "p") == key(0, 1, "p")
    True
    """
    text = "\x1f".join(f"{type(part).__name__[0]}:{part}" for part in address)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def uniforms(keys: Sequence[int] | np.ndarray, counters: Sequence[int] | np.ndarray) -> np.ndarray:
    """Draw one uniform per (key, counter) pair.

    Args:
        keys: `[N]` 64-bit keys.
        counters: `[N]` non-negative draw numbers (in sampling: index of the token within its node).

    Returns:
        `[N]` float64 in [0, 1).
    """
    state = np.asarray(keys, dtype=np.uint64)
    with np.errstate(over="ignore"):
        state = state + (np.asarray(counters, dtype=np.uint64) + np.uint64(1)) * _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * _MANTISSA


def generator(*address: int | str) -> np.random.Generator:
    """Make the numpy generator of an address, for libraries that take a generator."""
    return np.random.Generator(np.random.Philox(key=key(*address)))
