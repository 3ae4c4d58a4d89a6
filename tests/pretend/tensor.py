"""Tensors on the pretended device: a CPU tensor inside, `cuda:0` outside, and the rules by which CUDA refuses an operation.

torch's C++ takes them for CUDA tensors: device, dispatch keys (autocast and autograd of CUDA), the moves that indexing makes.
Kernels are the CPU's, called on what is inside.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda", 0)

COPIES = {"copy_", "_to_copy"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
"""Operations that take a tensor of CUDA with indices of the CPU."""
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


@dataclass(frozen=True)
class Operation:
    """What an operation's schema says, read once."""

    name: str
    draws: bool
    """It takes random numbers."""
    mutable: bool
    many: bool
    """It returns several values."""
    written: tuple[tuple[int, str] | None, ...]
    """For each returned value the argument that it is, by place and by name; None: a new one."""

    @classmethod
    @functools.cache
    def of(cls, func: Any) -> Operation:
        schema = func._schema
        changed = [
            (declared.alias_info.before_set, (place, declared.name))
            for place, declared in enumerate(schema.arguments)
            if declared.alias_info is not None and declared.alias_info.is_write
        ]
        written = [
            next(argument for names, argument in changed if names == returned.alias_info.before_set)
            if returned.alias_info is not None and returned.alias_info.is_write else None
            for returned in schema.returns
        ]  # fmt: skip
        draws = torch.Tag.nondeterministic_seeded in func.tags
        return cls(func.overloadpacket.__name__, draws, schema.is_mutable, len(written) > 1, tuple(written))


def call(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """One operation: refused, or done by the CPU inside, its results on the device that CUDA would leave them on."""
    operation = Operation.of(func)
    flat = list(_flat(args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    plain = [x for x in tensors if not isinstance(x, Pretended)]
    if plain and len(plain) < len(tensors):
        _refuse_mixed(operation, plain, args)
    _refuse_kind(operation.name, tensors)
    target = next((_checked(x) for x in flat if isinstance(x, torch.device)), None)
    here = len(plain) < len(tensors) if target is None else target.type == "cuda"
    generator = next((x for x in flat if isinstance(x, torch.Generator)), None)
    if generator is not None and here and generator._cdata not in generators:  # type: ignore[attr-defined]
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")

    inner_args = [_inside(x) for x in args]
    inner_kwargs = {key: _inside(x) for key, x in kwargs.items() if key != "pin_memory"}
    if operation.draws and here and generator is None:
        with OwnStream():
            out = func(*inner_args, **inner_kwargs)
    else:
        out = func(*inner_args, **inner_kwargs)

    def outside(x: Any, argument: tuple[int, str] | None) -> Any:
        if argument is not None:  # a written argument is returned as it is
            return kwargs[argument[1]] if argument[1] in kwargs else args[argument[0]]
        return _outside(x) if here else x

    if operation.many:
        return tuple(outside(x, argument) for x, argument in zip(out, operation.written, strict=True))
    return outside(out, operation.written[0]) if operation.written else out


def _flat(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Any]:
    for x in (*args, *kwargs.values()):
        if isinstance(x, list | tuple):
            yield from x
        else:
            yield x


def _inside(x: Any) -> Any:
    if isinstance(x, Pretended):
        return x.inner
    if isinstance(x, list | tuple):
        return [_inside(y) for y in x]
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x


def _outside(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pretended(x)
    return [_outside(y) for y in x] if isinstance(x, list | tuple) else x


def _checked(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index not in (None, 0):
        raise RuntimeError("CUDA error: invalid device ordinal")
    return device


def _refuse_mixed(operation: Operation, plain: Sequence[Tensor], args: Sequence[Any]) -> None:
    """CUDA takes a CPU tensor beside its own where it has no dimensions, in a copy, and as an index."""
    name = operation.name
    if name in COPIES:
        return
    refused = plain
    if name in INDEXED and isinstance(args[0], Pretended):  # indices are moved, and a value without dimensions
        value = args[2] if len(args) > 2 else None
        refused = [value] if isinstance(value, Tensor) and not isinstance(value, Pretended) and value.dim() else []
    elif name not in NO_CPU_SCALARS and name not in INDEXED and not (operation.mutable and any(args[0] is x for x in plain)):
        refused = [x for x in plain if x.dim()]
    if refused:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"(a CPU tensor of shape {tuple(refused[0].shape)} in {name})"
        )


def _refuse_kind(name: str, tensors: Sequence[Tensor]) -> None:
    if name in RESHAPES:
        raise NotImplementedError(f"pretended device: {name} changes the shape of a tensor in place")
    if name in INTEGER_PRODUCTS:
        for x in tensors:
            if not (x.dtype.is_floating_point or x.dtype.is_complex):
                kind = {torch.int64: "Long", torch.int32: "Int", torch.bool: "Bool"}.get(x.dtype, str(x.dtype))
                raise RuntimeError(f"\"{INTEGER_PRODUCTS[name]}\" not implemented for '{kind}'")
