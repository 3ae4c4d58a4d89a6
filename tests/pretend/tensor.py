"""Tensors on the pretended device: a CPU tensor inside, `cuda:0` outside, and the rules by which CUDA refuses an operation.

torch's C++ takes them for CUDA tensors: device, dispatch keys (autocast and autograd of CUDA), the moves that indexing makes, the
refusal of `numpy()`. Kernels are the CPU's, called on what is inside.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

DEVICE = torch.device("cuda", 0)

MOVES = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
"""Operations that take tensors of both devices; `index` and `index_put` take the indices only (`_refuse_mixed`)."""
NO_CPU_SCALARS = {
    "embedding", "embedding_dense_backward", "index_select", "gather", "scatter", "scatter_", "scatter_add", "scatter_add_",
    "index_add", "index_add_", "index_copy", "index_copy_", "mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "addmv", "dot",
    "take", "take_along_dim", "stack", "cat", "searchsorted", "bucketize", "nll_loss_forward", "masked_select",
}  # fmt: skip
"""Operations that are no element-wise arithmetic: a CPU tensor without dimensions is refused as well."""
INTEGER_PRODUCTS = {"mm": "addmm_cuda", "addmm": "addmm_cuda", "bmm": "baddbmm_cuda", "baddbmm": "baddbmm_cuda"}
"""Products that CUDA has for floats only, with the name in its message."""
RESHAPES = {"resize_", "t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_", "swapaxes_", "swapdims_", "set_"}


class Storage:
    """Identity and size of a storage; its bytes are not for the host."""

    device = DEVICE

    def __init__(self, inner: torch.UntypedStorage) -> None:
        self.data_ptr, self.nbytes, self.size = inner.data_ptr, inner.nbytes, inner.size


class Pretended(Tensor):
    """A tensor on the pretended device; `inner` holds the numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        assert inner.device.type == "cpu" and not isinstance(inner, Pretended)
        outer = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE
        )
        outer.inner = inner
        return outer

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})

    @property  # type: ignore[override]
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, Pretended):
            raise NotImplementedError("pretended device: .data set to a tensor of another device")
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.inner = new.inner

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def tolist(self) -> Any:
        return self.inner.tolist()

    def untyped_storage(self) -> Any:
        return Storage(self.inner.untyped_storage())

    def storage(self) -> Any:
        return Storage(self.inner.untyped_storage())

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __dlpack_device__(self) -> Any:
        return (2, 0)  # kDLCUDA

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("pretended device: there is no CUDA memory to hand out")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol")
        new = type(self)(self.inner.clone()).requires_grad_(self.requires_grad)
        memo[id(self)] = new
        if self.grad is not None:
            new.grad = copy.deepcopy(self.grad, memo)
        new.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k != "inner"}, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file remembers the device, as it does with a real one: a tensor on cuda:0 is read back to there."""
        attributes = {k: v for k, v in self.__dict__.items() if k != "inner"}
        return rebuild, (self.inner, self.requires_grad, attributes)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.inner.detach()!r}"[:-1] + ", device='cuda:0')"


def rebuild(inner: Tensor, requires_grad: bool, attributes: dict[str, Any]) -> Pretended:
    tensor = Pretended(inner).requires_grad_(requires_grad)
    tensor.__dict__.update(attributes)
    return tensor


random = torch.Generator()
"""The device's own random numbers, which the CPU's generator does not move."""


generators: dict[int, torch.Generator] = {random._cdata: random}  # type: ignore[attr-defined]
"""Generators of the device by their C++ address: an operation is handed another Python object."""


class OwnStream:
    """The CPU's kernels draw from the device's generator."""

    def __enter__(self) -> None:
        self.before = torch.get_rng_state()
        torch.set_rng_state(random.get_state())

    def __exit__(self, *_: object) -> None:
        random.set_state(torch.get_rng_state())
        torch.set_rng_state(self.before)


def call(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """One operation: refused, or done by the CPU inside, its results on the device that CUDA would leave them on."""
    name = func.overloadpacket.__name__
    flat, spec = pytree.tree_flatten((args, kwargs))
    _refuse_mixed(func, name, flat, args)
    _refuse_kind(name, flat)
    if name in RESHAPES:
        raise NotImplementedError(f"pretended device: {name} changes the shape of a tensor in place")
    target = next((_checked(x) for x in flat if isinstance(x, torch.device)), None)
    generator = next((x for x in flat if isinstance(x, torch.Generator)), None)
    here = any(isinstance(x, Pretended) for x in flat) if target is None else target.type == "cuda"
    if generator is not None and here and generator._cdata not in generators:  # type: ignore[attr-defined]
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")

    inner_args, inner_kwargs = pytree.tree_unflatten([_inside(x) for x in flat], spec)
    if inner_kwargs.get("pin_memory"):
        inner_kwargs["pin_memory"] = False
    if here and generator is None and torch.Tag.nondeterministic_seeded in func.tags:
        with OwnStream():
            out = func(*inner_args, **inner_kwargs)
    else:
        out = func(*inner_args, **inner_kwargs)
    return _results(func, args, kwargs, out, here)


def _results(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, here: bool) -> Any:
    """Written arguments are returned as they are; everything else is new."""
    returns = func._schema.returns
    many = isinstance(out, tuple | list) and len(returns) > 1
    outs = list(out) if many else [out]
    for i, declared in enumerate(returns):
        if declared.alias_info is not None and declared.alias_info.is_write:
            outs[i] = _written(func, declared.alias_info.before_set, args, kwargs)
        elif here:
            outs[i] = pytree.tree_map(lambda x: Pretended(x) if isinstance(x, Tensor) else x, outs[i])
    return tuple(outs) if many else outs[0]


def _written(func: Any, names: set[str], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    for place, declared in enumerate(func._schema.arguments):
        if declared.alias_info is not None and declared.alias_info.before_set == names:
            return kwargs[declared.name] if declared.name in kwargs else args[place]
    raise AssertionError(f"{func} writes to no argument")


def _inside(x: Any) -> Any:
    if isinstance(x, Pretended):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


def _checked(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index not in (None, 0):
        raise RuntimeError("CUDA error: invalid device ordinal")
    return device


def _refuse_mixed(func: Any, name: str, flat: Sequence[Any], args: Sequence[Any]) -> None:
    """CUDA takes a CPU tensor beside its own where it has no dimensions, in a copy, and as an index."""
    tensors = [x for x in flat if isinstance(x, Tensor)]
    plain = [x for x in tensors if not isinstance(x, Pretended)]
    if not plain or len(plain) == len(tensors) or name in ("copy_", "_to_copy"):
        return
    if name in MOVES and isinstance(args[0], Pretended):  # indices are moved, and a value without dimensions
        plain = [args[2]] if len(args) > 2 and not isinstance(args[2], Pretended) and args[2].dim() else []
    elif name not in NO_CPU_SCALARS and name not in MOVES and not (func._schema.is_mutable and any(args[0] is x for x in plain)):
        plain = [x for x in plain if x.dim()]
    if plain:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"(a CPU tensor of shape {tuple(plain[0].shape)} in {name})"
        )


def _refuse_kind(name: str, flat: Sequence[Any]) -> None:
    if name in INTEGER_PRODUCTS:
        for x in flat:
            if isinstance(x, Pretended) and not (x.dtype.is_floating_point or x.dtype.is_complex):
                kind = {torch.int64: "Long", torch.int32: "Int", torch.bool: "Bool"}.get(x.dtype, str(x.dtype))
                raise RuntimeError(f"\"{INTEGER_PRODUCTS[name]}\" not implemented for '{kind}'")
