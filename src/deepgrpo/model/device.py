"""The device of a model, by name, and the number of CPU threads for its size."""

from __future__ import annotations

import os
import re

import torch

from deepgrpo.errors import ConfigError
from deepgrpo.threads import NUMBER_OF_USERS, Threads, available_cpus, threads_for


def resolve_device(wanted: str, key: str = "run.device") -> str:
    """Resolve auto (cuda if available), cpu, cuda or cuda:N to a torch device.

    `key` is the config key, for messages. Raises ConfigError for another name or a device that is not available.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", wanted):
        raise ConfigError(f"{key} is {wanted!r}; use auto, cpu, cuda or cuda:N")
    if wanted == "cpu":
        return wanted
    if not torch.cuda.is_available():
        raise ConfigError(f'{key} is {wanted!r}, but torch sees no CUDA device; use "cpu" or "auto"')
    count = torch.cuda.device_count()
    if int(wanted.partition(":")[2] or 0) >= count:
        raise ConfigError(
            f"{key} is {wanted!r}, but torch sees {count} CUDA device{'s' if count > 1 else ''}; "
            f"the last one is cuda:{count - 1}"
        )
    return wanted


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
