"""Weights of a checkpoint in the Hugging Face layout: all of them, adapters merged into their base, or adapters alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deepgrpo.config import Config, GivenModel, PretrainedModel
from deepgrpo.errors import ConfigError, ModelError
from deepgrpo.eval.model import ModelSource, load_model
from deepgrpo.model.loading import came_in
from deepgrpo.model.merge import merged_state

_ADAPTERS, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, slots=True)
class WrittenModel:
    """Summary of the exported weights. Example: WrittenModel("all weights", "bfloat16", 14_400_000_000)."""

    kind: str
    """all weights, base model with merged adapters, or LoRA adapters."""
    dtype: str
    size: int
    """Bytes of the weights."""
    adapters: bool = False
    """True for adapters without their base."""


def write_model(config: Config, model: Path, to: Path, *, dtype: str, merge: bool) -> WrittenModel:
    """Write the model of a checkpoint.

    Args:
        config: the run's recipe.
        model: the checkpoint's model directory.
        to: an empty directory.
        dtype: auto, or the name of a torch dtype.
        merge: merge adapters into their base.

    Raises ConfigError for --merge without adapters or without their base, ModelError if the base cannot be loaded, OSError.
    """
    holds_adapters = (model / _ADAPTER_CONFIG).is_file()
    if merge and not holds_adapters:
        raise ConfigError("--merge: the run trains all weights and has no adapters (model.lora); leave it out")
    if holds_adapters and not merge:
        chosen = torch.float32 if dtype == "auto" else _named(dtype)
        _write_adapters(config, model, to, chosen)
        kind = "LoRA adapters"
    else:
        chosen = _original_dtype(config) if dtype == "auto" else _named(dtype)
        (_write_merged if merge else _write_whole)(config, model, to, chosen)
        kind = "base model with merged adapters" if merge else "all weights"
    size = sum(file.stat().st_size for file in to.glob("*.safetensors"))
    return WrittenModel(kind, str(chosen).removeprefix("torch."), size, holds_adapters and not merge)


def _named(dtype: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype)
    return found


def _original_dtype(config: Config) -> torch.dtype:
    """The dtype in which the run's model came; float32 for one from scratch or of a Python program."""
    if not isinstance(config.model, PretrainedModel):
        return torch.float32
    try:
        return came_in(config.model)
    except ModelError as error:
        raise ModelError(f"the dtype in which the base model came cannot be read ({error}); name one with --dtype") from error


def _write_whole(config: Config, model: Path, to: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trusted: Any = {"trust_remote_code": isinstance(config.model, PretrainedModel) and config.model.trust_remote_code}
    AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **trusted).save_pretrained(to)
    AutoTokenizer.from_pretrained(model, **trusted).save_pretrained(to)


def _write_merged(config: Config, model: Path, to: Path, dtype: torch.dtype) -> None:
    if isinstance(config.model, GivenModel):
        raise ConfigError(
            f"--merge: the base model was a {config.model.name} of a Python program, which is not here; export the adapters "
            "alone, and merge them there with peft (merge_and_unload)"
        )
    policy = load_model(ModelSource(str(model), config), "cpu", "float32")
    policy.causal.save_pretrained(to, state_dict=merged_state(policy, dtype))
    settings = json.loads((to / "config.json").read_text(encoding="utf-8"))
    settings["dtype"] = str(dtype).removeprefix("torch.")  # transformers writes that of the model in memory
    (to / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    policy.tokenizer.save_pretrained(to)


def _write_adapters(config: Config, model: Path, to: Path, dtype: torch.dtype) -> None:
    for file in model.iterdir():
        if file.is_file() and file.name not in (_ADAPTERS, _ADAPTER_CONFIG, "README.md"):
            shutil.copyfile(file, to / file.name)
    stored = {name: tensor.to(dtype).contiguous() for name, tensor in load_file(model / _ADAPTERS).items()}
    save_file(stored, to / _ADAPTERS, metadata={"format": "pt"})
    settings = json.loads((model / _ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if isinstance(config.model, PretrainedModel):
        settings["base_model_name_or_path"] = config.model.path
    (to / _ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
