"""A CUDA backend for a CPU build of torch, as far as its C++ asks for one: device guard, hooks and autograd's queue.

torch brings a guard that does nothing, for its fake tensors on machines without a GPU; a CPU build leaves it out and answers
"not linked with support for cuda devices" when a tensor on `cuda:0` is differentiated. `register` puts it in place, and makes
the hooks (what torch asks about the accelerator) answer that one device is there. Both are C++ objects with tables of virtual
functions; the places in the tables are read from the headers that come with torch, and each function put there is one of
torch's own, so nothing of this calls Python.

It cannot be undone: only for a process of its own (`server.py`).
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import torch

ROOT = Path(torch.__file__).parent
CUDA = 1
"""`c10::DeviceType::CUDA`, the place in the registry of guards."""
SIZE = 64
"""Entries that are copied of a table: more than either has."""

_kept: list[object] = []
"""Memory that torch points to from now on."""


def usable() -> bool:
    """The layout of the tables is that of the Itanium C++ ABI, and this build of torch has no CUDA."""
    return sys.platform == "linux" and torch.version.cuda is None and (ROOT / "include/ATen/detail").is_dir()


def places(header: str, name: str) -> dict[str, int]:
    """Place of each virtual function of a struct in its table; a destructor takes two."""
    text = re.sub(r"//.*", "", (ROOT / "include" / header).read_text())
    start = re.search(rf"struct \S+ {name}\b[^;{{]*{{", text)
    assert start, f"{header} has no struct {name}"
    found, place = {}, 0
    for function in re.findall(r"\bvirtual\s+[^;{(]*?(~?\w+)\s*\(", text[start.end() :].split("\n};")[0]):
        found[function] = place
        place += 2 if function.startswith("~") else 1
    return found


def register() -> None:
    """Let torch's C++ see one CUDA device. Call before the first backward: autograd counts the devices once."""
    c10, cpu = (ctypes.CDLL(str(ROOT / "lib" / library)) for library in ("libc10.so", "libtorch_cpu.so"))
    hook = places("ATen/detail/AcceleratorHooksInterface.h", "AcceleratorHooksInterface")
    guard = places("c10/core/impl/DeviceGuardImplInterface.h", "DeviceGuardImplInterface")
    get_hooks = cpu._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    hooks: int = get_hooks()
    zero = _table(hooks)[hook["isBuilt"]]

    registry = ctypes.addressof(ctypes.c_void_p.in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE"))
    entry = ctypes.c_void_p.from_address(registry + CUDA * ctypes.sizeof(ctypes.c_void_p))
    absent = _new_object([zero] * SIZE)  # a guard that counts no devices is what torch replaces by its own
    entry.value = absent
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
    assert entry.value and entry.value != absent, "this torch does not set up its guard for fake CUDA tensors"
    table = _table(entry.value)
    one = table[guard["type"]]  # returns DeviceType::CUDA
    entry.value = _new_object([one if place == guard["deviceCount"] else value for place, value in enumerate(table)])

    answers = _table(hooks)
    for name in ("isBuilt", "isAvailable", "hasPrimaryContext", "deviceCount"):
        answers[hook[name]] = one
    for name in ("init", "setCurrentDevice", "getCurrentDevice", "exchangeDevice", "maybeExchangeDevice"):
        answers[hook[name]] = zero
    allocator = ctypes.cast(c10._ZN3c1015GetCPUAllocatorEv, ctypes.c_void_p).value
    assert allocator
    answers[hook["getPinnedMemoryAllocator"]] = allocator
    ctypes.c_void_p.from_address(hooks).value = _new_table(answers)
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert torch._C._accelerator_hooks_device_count() == 1  # type: ignore[attr-defined]


def _table(instance: int) -> list[int]:
    start = ctypes.c_void_p.from_address(instance).value
    assert start
    return [value or 0 for value in (ctypes.c_void_p * SIZE).from_address(start)]


def _new_table(functions: list[int]) -> int:
    table = (ctypes.c_void_p * len(functions))(*functions)
    _kept.append(table)
    return ctypes.addressof(table)


def _new_object(functions: list[int]) -> int:
    instance = (ctypes.c_void_p * 1)(_new_table(functions))
    _kept.append(instance)
    return ctypes.addressof(instance)
