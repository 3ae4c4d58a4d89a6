"""LoRA adapters: attach them to a model, find out whether a model has them, read them back from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from deepgrpo.config import GivenModel, PretrainedModel
from deepgrpo.errors import MissingExtraError, ModelError, first_line


def has_adapters(model: nn.Module) -> bool:
    """Check for peft's wrapper."""
    return hasattr(model, "disable_adapter") and hasattr(model, "get_base_model")


def add_adapters(model: Any, config: PretrainedModel | GivenModel) -> Any:
    """Wrap a model with new adapters, drawn from torch's global random stream.

    Raises ModelError if `target_modules` does not fit the model, MissingExtraError if peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "lora", "model.lora") from None
    assert config.lora is not None
    wanted = config.lora.target_modules
    settings = peft.LoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=wanted if isinstance(wanted, str) else list(wanted),
    )  # fmt: skip
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(f"model.lora.target_modules = {wanted!r} does not fit the model: {first_line(error)}") from error


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
