"""Rollouts whose keys and values are kept, so that their branches need not encode a prefix again.

Within a memory budget, first come first kept; a rollout that no longer fits is simply not kept, and a prefix that is not
found is encoded like any other (and billed). Shapes: h key/value heads, n tokens, d head dimension, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deepgrpo.engines.embedded.slots import Prefix


@dataclass(frozen=True, slots=True)
class _Rollout:
    tokens: tuple[int, ...]
    """Prefix and sampled tokens that have keys: all but the last."""
    layers: list[tuple[Tensor, Tensor]]
    """`[h, n, d]` keys and values of each layer."""
    hidden: Tensor
    """`[m, H]` last hidden states of the tokens from `first` on: what the output layer needs for the next token."""
    first: int


class KeptRollouts:
    """Finished rollouts by the prefix that they were sampled from.

    Args:
        budget: bytes of keys, values and hidden states.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.clear()

    def clear(self) -> None:
        """Forget everything: the weights have changed, or nobody will come back."""
        self.used = 0
        self._rollouts: dict[tuple[int, ...], list[_Rollout]] = {}

    def put(
        self, prefix: tuple[int, ...], tokens: tuple[int, ...], layers: list[tuple[Tensor, Tensor]], hidden: Tensor
    ) -> None:
        """Keep a rollout, if there is room.

        Args:
            prefix: what it was sampled from.
            tokens: the sampled tokens that were fed back, so all but the last one.
            layers: views into the slots, `[h, n, d]` for the n tokens of prefix and `tokens`; copied.
            hidden: `[1 + len(tokens), H]` from the last token of the prefix on; copied.
        """
        size = sum(x.numel() * x.element_size() for pair in layers for x in pair) + hidden.numel() * hidden.element_size()
        if self.used + size > self.budget:
            return
        self.used += size
        copies = [(keys.clone(), values.clone()) for keys, values in layers]
        rollout = _Rollout(prefix + tokens, copies, hidden.clone(), len(prefix) - 1)
        self._rollouts.setdefault(prefix, []).append(rollout)

    def find(self, wanted: tuple[int, ...]) -> Prefix | None:
        """The encoded prefix if some rollout begins with it, as views; else None."""
        length = len(wanted)
        for start in {len(prefix) for prefix in self._rollouts}:
            for rollout in self._rollouts.get(wanted[:start], ()):
                if start <= length <= len(rollout.tokens) and rollout.tokens[:length] == wanted:
                    layers = [(keys[:, :length], values[:, :length]) for keys, values in rollout.layers]
                    return Prefix(layers, rollout.hidden[length - 1 - rollout.first])
        return None
