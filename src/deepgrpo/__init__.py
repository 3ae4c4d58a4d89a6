"""Post-training of language models with DEEP-GRPO. Start with `train/loop.py`, or with a file in `recipes/`.

    from deepgrpo import train, steps, evaluate, load_run, load_trees          runs (docs/library.md)
    from deepgrpo import group_advantages, select_pivots, dual_stream_loss     pure functions for other trainers

The public names are loaded when they are first used, so `import deepgrpo` is quick and needs no torch. `__init__.pyi` has them
for type checkers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    # runs
    "train": "train",  # the package, which can be called (train/__init__.py)
    "steps": "library.training",
    "Steps": "library.training",
    "evaluate": "library.evaluation",
    "EvalResult": "eval.evaluate",
    "Run": "library.run",
    "Callback": "library.callbacks",
    "load_run": "library.frames",
    "load_trees": "library.frames",
    # recipes
    "Config": "config",
    "list_recipes": "config",
    "load_recipe": "config",
    "parse_config": "config",
    "to_toml": "config",
    # pure functions
    "group_advantages": "library.arrays",
    "select_pivots": "library.arrays",
    "PivotDraw": "library.arrays",
    "fit_recoverability": "library.arrays",
    "Recoverability": "explore.recoverability",
    "dual_stream_loss": "library.arrays",
    "pack_trees": "library.packing",
    "Packed": "library.packing",
    "tree_mask": "library.packing",
    "pass_at_k": "eval.pass_at_k",
    "maj_at_k": "eval.pass_at_k",
    # strategies
    "Strategy": "explore.base",
    "Stateless": "explore.base",
    "Context": "explore.base",
    "Limits": "explore.base",
    "Signal": "explore.base",
    "main_pivot": "explore.base",
    "build_segmenter": "explore.segments",
    "sibling_credit": "credit.siblings",
    # environments
    "Environment": "envs.base",
    "Turn": "envs.base",
    # records
    "Completion": "records",
    "Credit": "records",
    "CreditSpan": "records",
    "Group": "records",
    "Ledger": "ledger",
    "Node": "records",
    "Pivot": "records",
    "Prompt": "records",
    "SampleRequest": "records",
    "Score": "feedback",
    "StepReport": "ledger",
    "Tree": "records",
    # errors
    "DeepGRPOError": "errors",
    "CallbackError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "DivergenceError": "errors",
    "EngineError": "errors",
    "EnvError": "errors",
    "MissingExtraError": "errors",
    "ModelError": "errors",
    "RewardError": "errors",
    "StrategyError": "errors",
    "TrainingError": "errors",
}
"""Public name -> the module it lives in."""

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deepgrpo' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module = import_module(f"deepgrpo.{_HOME[name]}")
    return module if _HOME[name] == name else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
