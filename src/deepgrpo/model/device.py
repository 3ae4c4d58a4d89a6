"""The device of a model, by name, its free memory, and the number of CPU threads for the model's size.

`xpu` and `mps` may be named, and were never run. What decides there is what is tried at load: the model's log-probs against
those of the CPU (`moved`), the packing of trees (tree_gate.py) and the engine's slots (engines/embedded/slot_gate.py).
"""

from __future__ import annotations

import os
import re
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from deepgrpo.errors import ConfigError, ModelError
from deepgrpo.threads import NUMBER_OF_USERS, Threads, available_cpus, threads_for

NAMES = re.compile(r"cpu|mps|(cuda|xpu)(:\d+)?")
"""Devices that a user may name, besides auto."""


def resolve_device(wanted: str, key: str = "run.device") -> str:
    """Resolve auto (cuda if available, else cpu), cpu, cuda, cuda:N, xpu, xpu:N or mps to a torch device.

    `key` is the config key, for messages. Raises ConfigError for another name or a device that is not available.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not NAMES.fullmatch(wanted):
        raise ConfigError(f"{key} is {wanted!r}; use auto, cpu, cuda or cuda:N, xpu or xpu:N, or mps")
    if wanted == "cpu":
        return wanted
    kind, _, number = wanted.partition(":")
    module: Any = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.mps}[kind]
    there = torch.backends.mps.is_available() if kind == "mps" else module.is_available()
    if not there:
        raise ConfigError(f'{key} is {wanted!r}, but torch sees no {kind.upper()} device; use "cpu" or "auto"')
    count = module.device_count()
    if int(number or 0) >= count:
        raise ConfigError(
            f"{key} is {wanted!r}, but torch sees {count} {kind.upper()} device{'s' if count > 1 else ''}; "
            f"the last one is {kind}:{count - 1}"
        )
    return wanted


def free_memory(device: str) -> int:
    """Bytes available on a device of this machine; of the host with swap."""
    kind = device.partition(":")[0]
    if kind in ("cuda", "xpu"):
        module: Any = getattr(torch, kind)
        return int(module.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    if kind == "mps":  # the host's memory, of which Metal takes a part
        return min(free, int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()))
    return free


# ---------------------------------------------------------------- proof of a device that was never run

_PROVEN = ("cpu", "cuda", "meta")
_LIMIT = 1e-2
"""Largest difference of a log-prob between the CPU and the device, in float32; a wrong kernel is off by more than 1."""


@torch.no_grad()
def moved(model: nn.Module, device: str) -> nn.Module:
    """Move a model to a device. On one that is neither the CPU nor CUDA, its log-probs must be those of the CPU.

    Raises ModelError if they are not.
    """
    if torch.device(device).type in _PROVEN:
        return model.to(device)
    expected = _logprobs(model, "cpu")
    model = model.to(device)
    require_same(expected, _logprobs(model, device), device)
    return model


def require_same(expected: Tensor, found: Tensor, device: str) -> None:
    """Raise ModelError if the log-probs of a device are not those of the CPU."""
    off = float(torch.where(expected == found, 0.0, expected - found).abs().max())
    if not off < _LIMIT:
        raise ModelError(
            f"run.device is {device!r}, and the model does not compute there what it computes on the CPU: log-probs differ by "
            f'{off:.1e}; use "cpu", or another version of torch'
        )


def _logprobs(model: Any, device: str) -> Tensor:
    training, rows = model.training, model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(24, device=device)[None] * 7 % rows
    try:
        logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits[0]
    finally:
        model.train(training)
    return torch.log_softmax(logits.float(), -1).cpu()


def use_threads(model: torch.nn.Module | None, wanted: int | None, key: str = "run.threads") -> Threads:
    """Set the number of CPU threads of torch.

    The recipe decides first, then the variables of OpenMP and MKL, then the size of the model.

    Args:
        model: None before its size is known: all CPUs.
        wanted: the recipe's number.
        key: its config key, for the first line of a run.
    """
    cpus = available_cpus()
    users = [name for name in NUMBER_OF_USERS if name in os.environ]
    if wanted:
        chosen = Threads(wanted, cpus, key)
    elif users:
        chosen = Threads(torch.get_num_threads(), cpus, users[0])
    else:
        size = None if model is None else sum(p.numel() for p in model.parameters())
        number = cpus if size is None else threads_for(size, cpus)
        chosen = Threads(number, cpus, "" if size is None else f"model of {size / 1e6:.2f}M parameters")
    torch.set_num_threads(chosen.number)
    return chosen
