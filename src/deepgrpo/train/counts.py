"""Numbers of parameters of a model, and the bytes that they take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepgrpo.model.materialize import first_of_each_kind
from deepgrpo.model.policy import Policy


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of parameters. Example: a model of two layers of 10 and an embedding of 50 has Counts(70, 70, 10, 50)."""

    every: int
    trained: int
    layer: int
    """Parameters of the largest decoder layer; 0 if no layers are found."""
    rest: int
    """Parameters outside the layers: embeddings, head, last norm."""
    kinds: int = 1
    """Kinds of decoder layers, such as sliding and full attention."""
    narrow: int = 0
    """Number of parameters stored in 2 bytes; the others take 4."""
    narrow_layer: int = 0
    """Number of them in the largest decoder layer."""
    narrow_rest: int = 0
    """The same outside the layers."""

    @property
    def weights(self) -> int:
        """Bytes of all parameters."""
        return 4 * self.every - 2 * self.narrow

    @property
    def layer_weights(self) -> int:
        return 4 * self.layer - 2 * self.narrow_layer

    @property
    def rest_weights(self) -> int:
        return 4 * self.rest - 2 * self.narrow_rest

    @property
    def trial(self) -> int:
        """Bytes for the packing trial of each learner before sharding: the first layer of each kind, the gradient of one, and
        the parameters outside the layers.
        """
        return self.rest_weights + (self.kinds + 1) * self.layer_weights

    @classmethod
    def of(cls, policy: Policy) -> Counts:
        (every, narrow), layers = _count(policy.model), [_count(layer) for layer in policy.layers or ()]
        trained = sum(p.numel() for p in policy.trainable().values())
        largest = max(layers, default=(0, 0))
        rest, narrow_rest = (whole - sum(of_layers) for whole, of_layers in (
            (every, [count for count, _ in layers]), (narrow, [count for _, count in layers])
        ))  # fmt: skip
        kinds = len(first_of_each_kind(policy))
        return cls(every, trained, largest[0], rest, kinds, narrow, largest[1], narrow_rest)


def _count(module: torch.nn.Module) -> tuple[int, int]:
    """Numbers of parameters, and of those stored in 2 bytes."""
    sizes = [(p.numel(), p.element_size()) for p in module.parameters()]
    return sum(count for count, _ in sizes), sum(count for count, size in sizes if size == 2)
