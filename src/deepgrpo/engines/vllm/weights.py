"""Export the policy's weights as a model directory for vLLM: adapters merged, in vLLM's dtype, with checkpoint names."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepgrpo.model.policy import Policy

MEMORY = Path("/dev/shm")
"""Preferred location: a file system in memory, as weights are written every step."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(policy: Policy) -> tuple[int, ...]:
    """One number per parameter that changes with its values: the sum of its bits, read as integers.

    Comparing fingerprints detects every change of the weights (optimizer, checkpoint, warm start) without a notification,
    and a step that changed nothing sends nothing. It reads all weights once.
    """
    sums = [
        p.detach().contiguous().view(_BITS[p.element_size()]).sum(dtype=torch.int64) for p in policy.model.parameters()
    ]
    return tuple(int(s) for s in torch.stack(sums).tolist())


@torch.no_grad()
def merged_state(policy: Policy, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of the model without adapters, in another dtype, by module name; adapters are merged in float32.

    They lie in host memory: on a GPU the copy might not fit beside vLLM's own. Tied weights stay one tensor, so that they are
    written once.
    """
    causal = policy.causal
    adapted = {
        f"{name}.base_layer.weight": module for name, module in causal.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
    }  # fmt: skip
    state: dict[str, Tensor] = {}
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    for name, value in causal.state_dict().items():
        if ".lora_" in name:
            continue
        if name in adapted:
            tensor = (value + _delta(adapted[name])).to(dtype).cpu()
        elif not value.is_floating_point():
            tensor = value.cpu()
        else:
            key = (value.data_ptr(), value.shape)
            if key not in cast:
                cast[key] = value.to(dtype).cpu()
            tensor = cast[key]
        state[name.replace(".base_layer.", ".")] = tensor
    return state


def _delta(module: Any) -> Tensor:
    """Sum of what the active adapters of a layer add to its weight."""
    start = torch.zeros((), device=module.base_layer.weight.device)
    total: Tensor = sum((module.get_delta_weight(adapter) for adapter in module.active_adapters), start=start)
    return total


def write_weights(policy: Policy, directory: Path, dtype: torch.dtype) -> None:
    """Write config and weights with transformers, as some families store weights in another layout than in memory."""
    policy.causal.save_pretrained(directory, state_dict=merged_state(policy, dtype))


def write_tokenizer(policy: Policy, directory: Path) -> bool:
    """Write the tokenizer to the directory. Returns False if it cannot be saved."""
    save = getattr(policy.tokenizer, "save_pretrained", None)
    if save is not None:
        save(directory)
    return save is not None


def transfer_directory(policy: Policy, dtype: torch.dtype) -> Path:
    """Create a directory for the weights, in memory if there is room."""
    size = sum(p.numel() for p in policy.model.parameters()) * dtype.itemsize
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 1.5 * size
    return Path(tempfile.mkdtemp(prefix="deepgrpo-vllm-", dir=MEMORY if roomy else None))
