"""Post-training of language models with DEEP-GRPO. Start with `train/loop.py`, or with a file in `recipes/`.

The public names are loaded when they are first used, so `import deepgrpo` is quick and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "load_recipe": "config",
    "parse_config": "config",
    "to_toml": "config",
    "DeepGRPOError": "errors",
    "Completion": "records",
    "Credit": "records",
    "Ledger": "records",
    "Node": "records",
    "Pivot": "records",
    "Prompt": "records",
    "SampleRequest": "records",
    "Score": "records",
    "StepReport": "records",
    "Tree": "records",
}
"""Public name -> the module it lives in."""

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deepgrpo' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(f"deepgrpo.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
