"""LoRA adapters: attach them to a model, find out whether a model has them, read them back from a checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepgrpo.config import GivenModel, PretrainedModel
from deepgrpo.errors import ModelError, first_line, requires_extra
from deepgrpo.model.narrow import computes, narrow, plain_again, posing_as_float32


def has_adapters(model: nn.Module) -> bool:
    """Check for peft's wrapper."""
    return hasattr(model, "disable_adapter") and hasattr(model, "get_base_model")


def adapter_rank(model: Any) -> int:
    """Largest rank of the active adapters of a model."""
    layers = (module for module in model.modules() if isinstance(getattr(module, "r", None), dict))
    return max(int(layer.r[name]) for layer in layers for name in layer.active_adapters)


def add_adapters(model: Any, config: PretrainedModel | GivenModel, frozen: torch.dtype = torch.float32) -> Any:
    """Wrap a model with new adapters, drawn from torch's global random stream.

    Args:
        frozen: dtype in which the frozen matrices are stored.

    Raises ModelError if `target_modules` does not fit the model, MissingExtraError if peft is not installed.
    """
    with requires_extra("peft", "lora", "model.lora"):
        import peft
    assert config.lora is not None
    wanted = config.lora.target_modules
    settings = peft.LoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=wanted if isinstance(wanted, str) else list(wanted),
    )  # fmt: skip
    try:
        with posing_as_float32(model), warnings.catch_warnings():
            # peft asks for an attribute that transformers will rename
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            model = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(f"model.lora.target_modules = {wanted!r} does not fit the model: {first_line(error)}") from error
    store_frozen(model, config.lora.base_dtype, frozen)
    return model


def store_frozen(model: Any, wanted: str, frozen: torch.dtype) -> None:
    """Store the frozen matrices of a model with adapters in a dtype; in float32 if its code cannot compute with them.

    Args:
        wanted: `model.lora.base_dtype`.

    Raises ModelError if it cannot, and the recipe asks for bfloat16.
    """
    narrow(model, frozen)
    if why := computes(model.get_base_model()):
        if wanted != "auto":
            raise ModelError(
                f'model.lora.base_dtype is "{wanted}", but the model does not compute with its matrices in bfloat16 ({why}); '
                'set it to "float32"'
            )
        narrow(model, torch.float32)
        plain_again(model)


def load_adapters(model: nn.Module, directory: Path) -> None:
    """Load the adapters that peft saved in a directory.

    Raises RuntimeError, as torch does for plain weights, if names or shapes differ.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    stored = load_file(directory / "adapter_model.safetensors")
    differing = set(get_peft_model_state_dict(model)) ^ set(stored)
    if differing:
        raise RuntimeError(f"the model and the checkpoint have different adapters: {sorted(differing)[:3]}")
    set_peft_model_state_dict(model, stored)
