"""`torch.cuda` and `torch.Generator` of the pretended device: one device, its answers to every question, its random numbers."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pretend import tensor as pretended

TOTAL, FREE = 80 * 2**30, 72 * 2**30
"""Memory of the device in bytes; the pretended device counts none of what lies on it."""

_Plain = torch.Generator


class _Generators(type(_Plain)):  # type: ignore[misc]
    def __instancecheck__(cls, other: Any) -> bool:
        return isinstance(other, _Plain)


class Generator(_Plain, metaclass=_Generators):
    """A generator that knows its device. A CPU factory that is given one of CUDA goes unnoticed: C++ sees the CPU's inside."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made: Generator = _Plain.__new__(cls, "cpu")
        made.place = _index(device)
        if made.place.type == "cuda":
            pretended.generators[made._cdata] = made  # type: ignore[attr-defined]
        return made

    def __init__(self, device: Any = "cpu") -> None:
        del device

    @property
    def device(self) -> torch.device:
        return self.place


class Stream:
    """Work is done when it is asked for: a stream has nothing to wait for."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or Event()
    def query(self) -> bool:
        return True
    def __enter__(self) -> Stream:
        return self
    def __exit__(self, *_: Any) -> None: ...


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True
    def elapsed_time(self, other: Any) -> float:
        return 0.0


class Place:
    """`torch.cuda.device(...)`: the current device for a while."""

    def __init__(self, device: Any) -> None:
        _index(device)

    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...


def _index(device: Any) -> torch.device:
    """A device as torch resolves it. Raises what CUDA raises for a number that is not there."""
    if device is None:
        return pretended.DEVICE
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type == "cuda":
        if found.index not in (None, 0):
            raise RuntimeError("CUDA error: invalid device ordinal")
        return pretended.DEVICE
    return found


def _properties(device: Any = None) -> Any:
    if _index(device).type != "cuda":
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return SimpleNamespace(
        name="Pretended GPU", total_memory=TOTAL, major=9, minor=0, multi_processor_count=132, is_integrated=False,
        warp_size=32, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448, L2_cache_size=52428800, gcnArchName="",
    )  # fmt: skip


def _get_state(device: Any = "cuda") -> Tensor:
    _index(device)
    return pretended.random.get_state()


def _set_state(state: Tensor, device: Any = "cuda") -> None:
    _index(device)
    if isinstance(state, pretended.Pretended) or state.dtype != torch.uint8:
        raise TypeError("RNG state must be a torch.ByteTensor")
    pretended.random.set_state(state)


def _set_states(states: Iterable[Tensor]) -> None:
    for number, state in enumerate(states):
        _set_state(state, number)


def _seed(seed: int) -> None:
    pretended.random.manual_seed(int(seed))


_pin, _is_pinned = Tensor.pin_memory, Tensor.is_pinned


def _pin_memory(self: Tensor, device: Any = None) -> Tensor:
    if isinstance(self, pretended.Pretended):
        raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")
    if getattr(self, "pinned", False):
        return self
    copy = _pin(self)
    copy.pinned = True  # type: ignore[attr-defined]
    return copy


def install() -> None:
    """Replace what would call the driver."""
    cuda: Any = torch.cuda
    answers: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "is_initialized": lambda: True,
        "init": lambda: None, "_lazy_init": lambda: None, "_is_in_bad_fork": lambda: False, "_is_compiled": lambda: True,
        "set_device": lambda device: _index(device) and None, "synchronize": lambda device=None: _index(device) and None,
        "empty_cache": lambda: None, "ipc_collect": lambda: None,
        "get_device_name": lambda device=None: _properties(device).name,
        "get_device_capability": lambda device=None: (_properties(device).major, _properties(device).minor),
        "get_device_properties": _properties,
        "mem_get_info": lambda device=None: (FREE, _properties(device).total_memory),
        "is_bf16_supported": lambda including_emulation=True: True, "is_tf32_supported": lambda: True,
        "get_arch_list": lambda: ["sm_90"],
        "get_rng_state": _get_state, "get_rng_state_all": lambda: [_get_state()],
        "set_rng_state": _set_state, "set_rng_state_all": _set_states,
        "manual_seed": _seed, "manual_seed_all": _seed, "seed": pretended.random.seed, "seed_all": pretended.random.seed,
        "initial_seed": pretended.random.initial_seed,
        "Stream": Stream, "Event": Event, "current_stream": Stream, "default_stream": Stream,
        "stream": lambda stream: stream or Stream(), "set_stream": lambda stream: None,
        "device": Place, "_exchange_device": lambda index: 0, "_maybe_exchange_device": lambda index: 0,
        "default_generators": (pretended.random,), "_initialized": True, "memory_stats": lambda device=None: {},
    }  # fmt: skip
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        answers[name] = lambda device=None: _index(device) and 0
    for name in ("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_accumulated_memory_stats"):
        answers[name] = lambda device=None: _index(device) and None
    for name, answer in answers.items():
        assert hasattr(cuda, name), f"torch.cuda.{name} does not exist"
        setattr(cuda, name, answer)
    for module in (cuda.memory, cuda.random):
        for name, answer in answers.items():
            if hasattr(module, name):
                setattr(module, name, answer)
    torch.Generator = Generator  # type: ignore[misc]
    Tensor.pin_memory = _pin_memory  # type: ignore[method-assign]
    Tensor.is_pinned = lambda self, device=None: getattr(self, "pinned", False)  # type: ignore[method-assign]
