"""Weights for a policy that has none (`outline.py`), one part of the model after another.

Whoever cuts or moves each part before the next one comes never has the whole model in its memory.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from deepgrpo.model.head import Head
from deepgrpo.model.policy import Policy
from deepgrpo.model.tree_gate import PackingVerdict, judge_model

Values = Mapping[str, Tensor]
"""Parameters and buffers by name; only to be read."""


@dataclass(frozen=True)
class Stored:
    """A tensor as bytes, which several processes can read where they lie (numpy has no bfloat16)."""

    raw: np.ndarray
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        flat = tensor.detach().cpu().contiguous().flatten()
        return cls(flat.view(torch.uint8).numpy(), tuple(tensor.shape), tensor.dtype)

    def tensor(self) -> Tensor:
        return tensor_of(self.raw).view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Fixed:
    """What of a loaded policy is not trained: with the weights that are, all that an outline of it lacks."""

    frozen: dict[str, Stored]
    """Parameters that are not trained."""
    buffers: dict[str, Stored]
    """All of them, those too that no checkpoint has (such as the frequencies of rotary embeddings)."""
    head: Head | None
    head_reason: str
    verdict: PackingVerdict

    @classmethod
    def of(cls, policy: Policy) -> Fixed:
        frozen = {name: Stored.of(p) for name, p in policy.model.named_parameters() if not p.requires_grad}
        buffers = {name: Stored.of(b) for name, b in policy.model.named_buffers()}
        return cls(frozen, buffers, policy.head, policy.head_reason, policy.verdict)

    def values_for(self, outline: Policy, trained: Mapping[str, np.ndarray]) -> Values | None:
        """All that an outline lacks, with the weights that are trained.

        None if it is not the same model: names, shapes, dtypes or what is trained differ (such as a head that is tied by the
        config and not in the files), or it has tensors that nobody could give it, as they are neither parameters nor buffers.
        """
        parameters, model = dict(outline.model.named_parameters()), outline.model
        ours = {**{n: tensor_of(a) for n, a in trained.items()}, **{n: s.tensor() for n, s in self.frozen.items()}}
        buffers = {name: stored.tensor() for name, stored in self.buffers.items()}
        same = (
            trained.keys() == outline.trainable().keys()
            and _alike(parameters, ours) and _alike(dict(model.named_buffers()), buffers)
            and not any(isinstance(t, Tensor) and t.is_meta for module in model.modules() for t in vars(module).values())
        )  # fmt: skip
        return {**ours, **buffers} if same else None


def _alike(missing: Mapping[str, Tensor], values: Values) -> bool:
    """Whether the values are those that are missing, all of them and no more."""
    return missing.keys() == values.keys() and all(
        t.is_meta and (t.shape, t.dtype) == (values[name].shape, values[name].dtype) for name, t in missing.items()
    )


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
        named = [*policy.model.named_parameters(), *policy.model.named_buffers()]
        self.names: dict[Tensor, str] = {tensor: name for name, tensor in named}

    @torch.no_grad()
    def fill(self, part: nn.Module) -> None:
        """Give a part of the model its values, where it has none yet."""
        made: dict[Tensor, Tensor] = {}  # tied ones stay one
        for module in part.modules():
            for place in (module._parameters, module._buffers):
                missing = {key: form for key, form in place.items() if form is not None and form.is_meta}
                for key, form in missing.items():
                    if form not in made:
                        made[form] = self._value_of(form)
                    place[key] = made[form]  # type: ignore[assignment]

    def _value_of(self, form: Tensor) -> Tensor:
        value = self.values[self.names[form]].to(self.device, copy=True)
        return nn.Parameter(value, requires_grad=form.requires_grad) if isinstance(form, nn.Parameter) else value


def judge_part(policy: Policy, values: Values, device: torch.device) -> PackingVerdict:
    """What `Policy.try_tree_packing` would find on that device, asked of an outline's first layer of each kind.

    The window is not asked for: it may be that of another layer.
    """
    short = copy.copy(policy)
    short.model = copy.deepcopy(policy.model)
    filling = Filling(short, values, device)  # while every layer is in its place
    layers, config = short.layers, short.causal.config.get_text_config()
    assert layers is not None
    kept = first_of_each_kind(short)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = [kinds[i] for i in kept]
    chosen = [layers[i] for i in kept]
    del layers[:]
    layers.extend(chosen)
    config.num_hidden_layers = len(kept)
    filling.fill(short.model)
    return judge_model(short.causal, policy.dtype)


def first_of_each_kind(policy: Policy) -> list[int]:
    """The first decoder layer of each kind that the config names, such as sliding and full attention; [0] if it names none."""
    kinds = list(getattr(policy.causal.config.get_text_config(), "layer_types", None) or [None])
    return sorted({kinds.index(kind) for kind in kinds})


def tensor_of(array: np.ndarray) -> Tensor:
    """A tensor on the memory of an array that may only be read; so must the tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
