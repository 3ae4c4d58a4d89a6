"""Give a meta policy its weights, one module at a time.

A caller that shards or moves each module before materializing the next never holds the whole model in memory.
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
"""Read-only parameters and buffers by name."""


@dataclass(frozen=True)
class TensorBytes:
    """A tensor as raw bytes, which several processes can map without a copy (numpy has no bfloat16)."""

    raw: np.ndarray
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorBytes:
        flat = tensor.detach().cpu().contiguous().flatten()
        return cls(flat.view(torch.uint8).numpy(), tuple(tensor.shape), tensor.dtype)

    def tensor(self) -> Tensor:
        return tensor_of(self.raw).view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class FrozenState:
    """Everything of a loaded policy that training does not change; with the trained weights it completes a meta policy."""

    frozen: dict[str, TensorBytes]
    """Parameters that are not trained."""
    buffers: dict[str, TensorBytes]
    """All buffers, including those that no checkpoint stores (such as the frequencies of rotary embeddings)."""
    head: Head | None
    head_reason: str
    verdict: PackingVerdict

    @classmethod
    def of(cls, policy: Policy) -> FrozenState:
        frozen = {name: TensorBytes.of(p) for name, p in policy.model.named_parameters() if not p.requires_grad}
        buffers = {name: TensorBytes.of(b) for name, b in policy.model.named_buffers()}
        return cls(frozen, buffers, policy.head, policy.head_reason, policy.verdict)

    def values_for(self, meta: Policy, trained: Mapping[str, np.ndarray]) -> Values | None:
        """Values for every parameter and buffer of a meta policy, given the trained weights.

        Returns None if the two models differ in names, shapes, dtypes or trained parameters (for example a head that is
        tied in the config and not in the files), or if the meta policy has meta tensors that are neither parameters nor
        buffers, which cannot be filled.
        """
        parameters, model = dict(meta.model.named_parameters()), meta.model
        ours = {**{n: tensor_of(a) for n, a in trained.items()}, **{n: s.tensor() for n, s in self.frozen.items()}}
        buffers = {name: stored.tensor() for name, stored in self.buffers.items()}
        same = (
            trained.keys() == meta.trainable().keys()
            and _fit(parameters, ours) and _fit(dict(model.named_buffers()), buffers)
            and not any(isinstance(t, Tensor) and t.is_meta for module in model.modules() for t in vars(module).values())
        )  # fmt: skip
        return {**ours, **buffers} if same else None


def _fit(missing: Mapping[str, Tensor], values: Values) -> bool:
    """Check that the values match the meta tensors one to one, in shape and dtype."""
    return missing.keys() == values.keys() and all(
        t.is_meta and (t.shape, t.dtype) == (values[name].shape, values[name].dtype) for name, t in missing.items()
    )


class Materializer:
    """Replaces the meta tensors of a policy by real ones.

    Args:
        policy: a meta policy.
        values: every parameter and buffer; they are copied.
        device: device of the copies.
    """

    def __init__(self, policy: Policy, values: Values, device: torch.device) -> None:
        self.values, self.device = values, device
        # keyed by the tensor itself; tied tensors have their first name
        named = [*policy.model.named_parameters(), *policy.model.named_buffers()]
        self.names: dict[Tensor, str] = {tensor: name for name, tensor in named}

    @torch.no_grad()
    def fill(self, part: nn.Module) -> None:
        """Replace all meta tensors of a module and its submodules."""
        made: dict[Tensor, Tensor] = {}  # tied tensors stay tied
        for module in part.modules():
            for slots in (module._parameters, module._buffers):
                missing = {key: form for key, form in slots.items() if form is not None and form.is_meta}
                for key, form in missing.items():
                    if form not in made:
                        made[form] = self._value_of(form)
                    slots[key] = made[form]  # type: ignore[assignment]

    def _value_of(self, form: Tensor) -> Tensor:
        value = self.values[self.names[form]].to(self.device, copy=True)
        return nn.Parameter(value, requires_grad=form.requires_grad) if isinstance(form, nn.Parameter) else value


def judge_meta_policy(policy: Policy, values: Values, device: torch.device) -> PackingVerdict:
    """Run the packing test of `Policy.try_tree_packing` on a device, on the first layer of each kind of a meta policy.

    The window of the verdict is not meaningful: it may belong to another layer.
    """
    short = copy.copy(policy)
    short.model = copy.deepcopy(policy.model)
    materializer = Materializer(short, values, device)  # before layers are removed and names change
    layers, config = short.layers, short.causal.config.get_text_config()
    assert layers is not None
    chosen = first_of_each_kind(short)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = [kinds[i] for i in chosen]
    remaining = [layers[i] for i in chosen]
    del layers[:]
    layers.extend(remaining)
    config.num_hidden_layers = len(chosen)
    materializer.fill(short.model)
    return judge_model(short.causal, policy.dtype)


def first_of_each_kind(policy: Policy) -> list[int]:
    """Index of the first decoder layer of each kind in the config, such as sliding and full attention; [0] without kinds."""
    kinds = list(getattr(policy.causal.config.get_text_config(), "layer_types", None) or [None])
    return sorted({kinds.index(kind) for kind in kinds})


def tensor_of(array: np.ndarray) -> Tensor:
    """A tensor that shares the memory of a read-only array; it must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
