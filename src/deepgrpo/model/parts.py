"""Weights for a policy that has none (`outline.py`), one part of the model after another.

Whoever cuts or moves each part before the next one comes never has the whole model in its memory.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from deepgrpo.model.head import Head
from deepgrpo.model.policy import Policy
from deepgrpo.model.tree_gate import Verdict, judge_model

Values = Mapping[str, np.ndarray]
"""Parameters and buffers by name."""


@dataclass(frozen=True)
class Fixed:
    """What of a loaded policy is not trained: with the weights that are, all that an outline of it lacks."""

    values: dict[str, np.ndarray]
    """Frozen parameters and all buffers, those too that no checkpoint has (such as the frequencies of rotary embeddings)."""
    head: Head | None
    head_reason: str
    verdict: Verdict

    @classmethod
    def of(cls, policy: Policy) -> Fixed:
        frozen = {name: p.detach() for name, p in policy.model.named_parameters() if not p.requires_grad}
        values = {name: t.cpu().numpy() for name, t in {**frozen, **dict(policy.model.named_buffers())}.items()}
        return cls(values, policy.head, policy.head_reason, policy.verdict)


class Filling:
    """Puts values in the place of a policy's missing ones.

    Args:
        policy: an outline.
        values: of every parameter and buffer; they are copied.
        device: where they go.
    """

    def __init__(self, policy: Policy, values: Values, device: torch.device) -> None:
        self.values, self.device = values, device
        # by the tensor itself, tied ones under their first name
        self.names: dict[Tensor, str] = {tensor: name for name, tensor in _tensors(policy)}

    @torch.no_grad()
    def fill(self, part: nn.Module) -> None:
        """Give a part of the model its values, where it has none yet."""
        made: dict[Tensor, Tensor] = {}  # tied ones stay one
        for module in part.modules():
            for place in (module._parameters, module._buffers):
                for key, form in place.items():
                    if form is not None and form.is_meta:
                        if form not in made:
                            made[form] = self._value_of(form)
                        place[key] = made[form]  # type: ignore[assignment]

    def _value_of(self, form: Tensor) -> Tensor:
        value = tensor_of(self.values[self.names[form]]).to(self.device, copy=True)
        return nn.Parameter(value, requires_grad=form.requires_grad) if isinstance(form, nn.Parameter) else value


def fits(policy: Policy, values: Values) -> bool:
    """Whether values are all that an outline lacks.

    Not so if a value is missing or of another shape, or if the model has tensors that are neither parameters nor buffers.
    """
    loose = any(isinstance(t, Tensor) and t.is_meta for module in policy.model.modules() for t in vars(module).values())
    return not loose and all(name in values and values[name].shape == t.shape for name, t in _tensors(policy))


def _tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    yield from policy.model.named_parameters()
    yield from policy.model.named_buffers()


def judge_part(policy: Policy, values: Values, device: torch.device) -> Verdict:
    """What `Policy.try_tree_packing` would find on that device, asked of the first layers of an outline.

    As many layers as show each kind of attention. The window is not asked for: it may be that of a later layer.
    """
    short = copy.copy(policy)
    short.model = copy.deepcopy(policy.model)
    layers = short.layers
    assert layers is not None, "only what has decoder layers is cut in parts"
    config = short.causal.config.get_text_config()
    kinds = list(getattr(config, "layer_types", None) or [])[: len(layers)]
    count = max((kinds.index(kind) + 1 for kind in kinds), default=1)
    del layers[count:]
    if kinds:
        config.layer_types = kinds[:count]
    config.num_hidden_layers = count
    Filling(short, values, device).fill(short.model)
    return judge_model(short.causal, policy.dtype)


def tensor_of(array: np.ndarray) -> Tensor:
    """A tensor on the memory of an array that may only be read; so must the tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
