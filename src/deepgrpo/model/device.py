"""Check the name of a device before anything is loaded."""

from __future__ import annotations

import re

import torch

from deepgrpo.errors import ConfigError


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
