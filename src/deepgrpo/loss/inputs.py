"""Inputs and output of a policy loss. Shapes: N terms of a pack, one per trained token.

A policy loss is a function `(LossInputs, LossSettings) -> LossOutput`: it gives each term its loss. It does not reduce. The
weight of a term, which holds the denominators, lambda and the reduction, comes from `loss/streams.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol

from torch import Tensor

from deepgrpo.loss.ratio import log_ratio


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Terms of a pack. All tensors are `[N]` and on one device; all terms of a sequence are in the same pack."""

    logprob_N: Tensor
    """float32; log-probs of the current policy, differentiable."""
    old_logprob_N: Tensor
    """float32; log-probs of the policy before the first optimizer step on the batch."""
    sampler_logprob_N: Tensor
    """float32; log-probs as the engine reported them."""
    advantage_N: Tensor
    """float32."""
    sequence_N: Tensor
    """int64; terms of one sequence (a rollout, or a branch without its prefix) share a number."""
    stream_N: Tensor
    """int64; 0 main, 1 branch."""

    def __len__(self) -> int:
        return len(self.logprob_N)

    def log_ratio(self, level: Literal["token", "sequence"] = "token") -> Tensor:
        """`[N]` log of the ratio of current and old policy, by token or by sequence (`loss/ratio.py`)."""
        return log_ratio(self.logprob_N, self.old_logprob_N, self.sequence_N if level == "sequence" else None)


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Loss of each term, before the reduction."""

    loss_N: Tensor
    """Differentiable with respect to `logprob_N`."""
    clipped_N: Tensor | None = None
    """Boolean; terms that a bound acts on, logged as `main/clip_fraction`. None: the loss has no bound."""
    figures: Mapping[str, Tensor] = field(default_factory=dict)
    """Further numbers per term, by name; logged as means over a stream. The names are the same for every pack."""


class LossSettings(Protocol):
    """Keys of the recipe's section `[loss]` that losses read."""

    @property
    def policy(self) -> str: ...
    @property
    def ratio(self) -> Literal["token", "sequence"]: ...
    @property
    def clip_range(self) -> tuple[float, float]: ...
    @property
    def dual_clip(self) -> float | None: ...
    @property
    def cispo_low(self) -> float: ...
    @property
    def cispo_high(self) -> float: ...
    @property
    def importance_range(self) -> tuple[float, float]: ...
    @property
    def importance_mode(self) -> Literal["truncate", "mask"]: ...


PolicyLoss = Callable[[LossInputs, LossSettings], LossOutput]


def assert_shapes(inputs: LossInputs) -> None:
    """Every tensor is `[N]`, and on the device of the log-probs."""
    shape, device = inputs.logprob_N.shape, inputs.logprob_N.device
    assert len(shape) == 1, f"logprob_N has the shape {tuple(shape)}"
    for f in fields(inputs):
        tensor: Tensor = getattr(inputs, f.name)
        assert tensor.shape == shape and tensor.device == device, f"{f.name}: {tuple(tensor.shape)} on {tensor.device}"
