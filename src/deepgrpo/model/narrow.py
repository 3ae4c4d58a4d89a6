"""Frozen matrices in 16 bits: stored in bfloat16 or float16, and multiplied in the dtype of their input.

A frozen matrix receives no update, so it needs no float32. Widening a 16-bit number is exact: if a model came in 16 bits, its
products are those of float32 storage, in float32 bit by bit, and under autocast too, which rounds the matrix to what it was.

Stored narrow are the weights of plain linear layers and embeddings, the bulk of most models. Biases, norms and modules of a
model's own kind stay in float32, as do adapters, which are trained.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepgrpo.errors import first_line

NARROW = {torch.bfloat16, torch.float16}


class _Product(torch.autograd.Function):
    """`x Wᵀ + b` with a narrow W, of which no wide copy is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(given if ctx.needs_input_grad[1] else None, weight)
        return F.linear(given, weight.to(given.dtype), bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        given, weight = ctx.saved_tensors
        flat = upstream.flatten(0, -2)
        of_given = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_given = (flat @ weight.to(flat.dtype)).view(*upstream.shape[:-1], -1)
        if ctx.needs_input_grad[1]:  # the packing test differentiates frozen weights
            of_weight = (flat.t() @ given.flatten(0, -2)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = flat.sum(0)
        return of_given, of_weight, of_bias


class NarrowLinear(nn.Linear):
    """A linear layer with a narrow weight."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype or torch.is_autocast_enabled(input.device.type):
            return F.linear(input, self.weight, self.bias)
        result: Tensor = _Product.apply(input, self.weight, self.bias)
        return result


class NarrowEmbedding(nn.Embedding):
    """An embedding with a narrow weight and float32 outputs, so that the residual stream is in float32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


_KINDS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: NarrowLinear, nn.Embedding: NarrowEmbedding}


def narrow(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the frozen matrices of a model in `dtype`, everything else in float32; in place.

    float32: all in float32. Tied matrices stay tied.
    """
    chosen = _matrices(model) if dtype in NARROW else {}
    for parameter in model.parameters():
        wanted = dtype if id(parameter) in chosen else torch.float32
        if parameter.is_floating_point() and parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype in NARROW:
                module._buffers[name] = buffer.float()
        if type(module) in _KINDS and id(module.weight) in chosen:
            module.__class__ = _KINDS[type(module)]


def _matrices(model: nn.Module) -> dict[int, nn.Parameter]:
    """Frozen weights, by id, that only plain linear layers and embeddings use."""
    chosen: dict[int, nn.Parameter] = {}
    others: set[int] = set()
    for module in model.modules():
        plain = type(module) in _KINDS or isinstance(module, NarrowLinear | NarrowEmbedding)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if plain and name == "weight" and not parameter.requires_grad and parameter.is_floating_point():
                chosen[id(parameter)] = parameter
            else:
                others.add(id(parameter))
    return {key: parameter for key, parameter in chosen.items() if key not in others}


def plain_again(model: nn.Module) -> None:
    """Make the narrow layers of a model, whose parameters all have one dtype by now, ordinary ones; in place."""
    ordinary = {ours: theirs for theirs, ours in _KINDS.items()}
    for module in model.modules():
        if type(module) in ordinary:
            module.__class__ = ordinary[type(module)]


def is_narrow(model: nn.Module) -> bool:
    """True if a model stores matrices in 16 bits and computes in the dtype of its inputs."""
    return any(isinstance(module, NarrowLinear | NarrowEmbedding) for module in model.modules())


@torch.no_grad()
def computes(causal: Any) -> str | None:
    """Try a model with narrow matrices on a token. Returns the reason if it fails: some code reads weights by itself."""
    if not is_narrow(causal) or next(causal.parameters()).is_meta:
        return None
    training = causal.training
    try:
        causal.eval()
        causal(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(causal.parameters()).device), use_cache=False)
    except Exception as error:  # a model's own code may raise anything
        return f"{type(error).__name__}: {first_line(error, 120)}"
    finally:
        causal.train(training)
    return None


@contextlib.contextmanager
def posing_as_float32(model: nn.Module) -> Iterator[None]:
    """Show the parameters of a model as float32, without their values, to code that gives new ones the same dtype.

    peft would round new adapters to the dtype of the layer, and draw other ones than over a float32 base.
    """
    real = [(parameter, parameter.data) for parameter in model.parameters() if parameter.dtype in NARROW]
    for parameter, data in real:
        parameter.data = torch.zeros((), device=data.device).expand(data.shape)
    try:
        yield
    finally:
        for parameter, data in real:
            parameter.data = data


# ---------------------------------------------------------------- the dtype that a model came in

def dtype_in(model: nn.Module) -> torch.dtype:
    """The 16-bit dtype that all floating parameters of a model share, else float32; trained adapters do not count."""
    found = {p.dtype for name, p in model.named_parameters() if p.is_floating_point() and "lora_" not in name}
    return found.pop() if len(found) == 1 and found <= NARROW else torch.float32


_NAMES = {"F32": torch.float32, "F64": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored_dtype(path: str, config: Any) -> torch.dtype:
    """The dtype that holds the weights of a model without loss: float32, bfloat16 or float16.

    Args:
        path: directory or hub name; the safetensors of a directory are asked first, of their headers only.
        config: the model's config.
    """
    found = {_NAMES[name] for file in Path(path).glob("*.safetensors") for name in _dtypes_in(file) if name in _NAMES}
    if not found:
        said = getattr(config, "dtype", None)
        found = {said} if said in NARROW else {torch.float32}
    return found.pop() if len(found) == 1 else torch.float32


def _dtypes_in(file: Path) -> set[str]:
    """The dtypes that a file of safetensors names; none if it cannot be read, which its reader will report."""
    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        return {str(entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        return set()
