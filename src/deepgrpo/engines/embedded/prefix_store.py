"""Keys and values of finished rollouts, so that their branches need not encode a prefix again.

Rollouts are stored in order of arrival until the memory budget is full; later ones are not stored. A prefix that is not
found is encoded like any other (and billed). A prompt's keys are stored once for all its rollouts.

In an episode the next turn's prefix goes on from a stored turn: `extend` finds the part that is known, the engine encodes the
rest, and only that rest is stored with the next turn (`Prefix.origin`).

Shapes: h key/value heads, n tokens, d head dimension, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepgrpo.engines.embedded.slots import Prefix


@dataclass(frozen=True, slots=True)
class _Rollout:
    tokens: tuple[int, ...]
    """Sampled tokens with keys: all but the last."""
    layers: list[tuple[Tensor, Tensor]]
    """`[h, n, d]` keys and values of these tokens."""
    hidden: Tensor
    """`[1 + n, H]` last hidden states from the end of the prefix on: the output layer's input for each next token."""


@dataclass(frozen=True, slots=True)
class _Group:
    layers: list[tuple[Tensor, Tensor]]
    """Keys and values of the prefix, behind its origin if it has one."""
    origin: Origin | None = None
    rollouts: list[_Rollout] = field(default_factory=list)

    @property
    def prefix_layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the whole prefix."""
        return self.layers if self.origin is None else joined(self.origin.layers, self.layers)


@dataclass(frozen=True, slots=True)
class Origin:
    """Beginning of a prefix that is in the store: a group's prefix and the first `count` tokens of one of its rollouts."""

    group: _Group
    rollout: _Rollout
    count: int

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        return joined(self.group.prefix_layers, self.rollout.layers, self.count)


class PrefixStore:
    """Finished rollouts by the prefix they were sampled from.

    Args:
        budget: bytes of keys, values and hidden states.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.clear()

    def clear(self) -> None:
        """Drop all rollouts."""
        self.used = 0
        self._groups: dict[tuple[int, ...], _Group] = {}

    def put(
        self, prefix_tokens: tuple[int, ...], prefix: Prefix, tokens: tuple[int, ...],
        layers: list[tuple[Tensor, Tensor]], hidden: Tensor,
    ) -> None:  # fmt: skip
        """Store a rollout if it fits into the budget.

        Args:
            prefix_tokens, prefix: the prefix it was sampled from; referenced, not copied.
            tokens: the n sampled tokens that were fed back: all but the last.
            layers: views into the slots, `[h, n, d]`; copied.
            hidden: `[1 + n, H]` from the last token of the prefix on; copied.
        """
        group = self._groups.get(prefix_tokens)
        rest = prefix.layers if prefix.origin is None else prefix.encoded
        size = _size(layers) + hidden.numel() * hidden.element_size() + (0 if group else _size(rest))
        if self.used + size > self.budget:
            return
        self.used += size
        if group is None:
            group = self._groups[prefix_tokens] = _Group(rest, prefix.origin)
        copies = [(keys.clone(), values.clone()) for keys, values in layers]
        group.rollouts.append(_Rollout(tokens, copies, hidden.clone()))

    def find(self, wanted: tuple[int, ...]) -> Prefix | None:
        """The encoded prefix if a stored rollout begins with it; else None."""
        found = self._find(wanted)
        if found is None:
            return None
        return Prefix(found.layers, found.rollout.hidden[found.count])

    def extend(self, wanted: tuple[int, ...], known: int) -> Origin | None:
        """The stored beginning of a prefix whose first `known` tokens end with a sampled turn: all but the last of these."""
        return self._find(wanted[: known - 1])

    def _find(self, wanted: tuple[int, ...]) -> Origin | None:
        for start in {len(prefix) for prefix in self._groups}:
            group = self._groups.get(wanted[:start])
            if group is None:
                continue
            rest = wanted[start:]
            for rollout in group.rollouts:
                if rollout.tokens[: len(rest)] == rest:
                    return Origin(group, rollout, len(rest))
        return None


def joined(
    prefix: Sequence[tuple[Tensor, Tensor]], own: Sequence[tuple[Tensor, Tensor]], count: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Concatenate a prefix with the first `count` tokens of a rollout (None: with all), contiguous per layer."""
    return [
        (torch.cat([keys, more_keys[:, :count]], 1), torch.cat([values, more_values[:, :count]], 1))
        for (keys, values), (more_keys, more_values) in zip(prefix, own, strict=True)
    ]


def _size(layers: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(x.numel() * x.element_size() for pair in layers for x in pair)
