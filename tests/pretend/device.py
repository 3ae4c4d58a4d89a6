"""A CUDA device that is not there: `install()` gives a CPU build of torch a `cuda:0` that refuses what CUDA refuses.

Everything is computed by the CPU's kernels, so results can be compared with the CPU's bit by bit; what is rehearsed is which
tensor lies where. It cannot be undone, so tests run in processes of their own: `server.py`.

    backend.py   torch's C++ sees one device
    tensor.py    tensors on it, and the rules
    queries.py   torch.cuda, generators

Not rehearsed: kernels and their rounding, memory, asynchronous errors, several devices, NCCL, `torch.compile`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from pretend import backend, queries
from pretend.tensor import Pretended, call

FLASH = 1
"""`SDPBackend::flash_attention`."""

_libraries: list[Any] = []


def install() -> None:
    """From here on this process has a pretended CUDA device."""
    importlib.import_module("torch._dynamo.device_interface")  # a CPU build's, which knows that it has no raw streams
    backend.register()
    queries.install()
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
    _take_modules()
    _take_factories()
    _take_attention()
    _take_optimizers()


def _take_factories() -> None:
    """Every operation without a tensor among its arguments: what it makes on CUDA is a pretended tensor."""
    library = torch.library.Library("aten", "IMPL")
    for packet in (getattr(torch.ops.aten, name) for name in torch.ops.aten):
        for overload in packet.overloads():
            operation = getattr(packet, overload)
            arguments = operation._schema.arguments
            if any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments):
                _take(library, operation)
    for operation in (torch.ops.aten.silu_backward.default, torch.ops.aten.mish_backward.default):
        _take(library, operation)  # without a kernel for the device torch would take several operations for these
    _libraries.append(library)


def _take(library: Any, operation: Any) -> None:
    library.impl(operation, lambda *args, **kwargs: call(operation, args, {"device": torch.device("cuda"), **kwargs}), "CUDA")


def _take_attention() -> None:
    """torch picks the kernel by the device; the pretended one takes the CPU's choice, so results are the CPU's."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", attention, "AutogradCUDA")
    _libraries.append(library)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` as its C++ goes on, with the CPU's choice of a kernel."""
    aten = torch.ops.aten
    inner = [x.inner if isinstance(x, Pretended) else x for x in (query, key, value, attn_mask)]
    choice = torch._fused_sdp_choice(*inner, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zero = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = zero.masked_fill_(attn_mask.logical_not(), float("-inf"))
    if choice == FLASH:
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
            value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
        out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
        return out
    plain: Tensor = aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return plain


def _take_modules() -> None:
    """The parameters of a module that moves stay the same objects, as on CUDA; loading copies, as everywhere."""
    plain = torch.nn.Module._apply

    def apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return plain(self, *args, **kwargs)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    torch.nn.Module._apply = apply  # type: ignore[method-assign]


def _take_optimizers() -> None:
    """torch's optimizers take their multi-tensor way for tensors on CUDA, by the type."""
    for name in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        supported = getattr(importlib.import_module(name), "_foreach_supported_types", None)
        if supported is not None and Pretended not in supported:
            supported.append(Pretended)
