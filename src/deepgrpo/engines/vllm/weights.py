"""Write the policy's weights for vLLM, in vLLM's dtype and with checkpoint names: all of them, or adapters alone."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from deepgrpo.model.adapters import has_adapters
from deepgrpo.model.merge import merged_state
from deepgrpo.model.policy import Policy

MEMORY = Path("/dev/shm")
"""Preferred location: a file system in memory, as weights are written every step."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(policy: Policy) -> tuple[int, ...]:
    """One number per parameter that changes with its values: the sum of its bits, read as integers.

    Comparing fingerprints detects every change of the weights (optimizer, checkpoint, warm start) without a notification,
    and a step that changed nothing sends nothing. It reads all weights once; those under adapters never change.
    """
    read = policy.trainable().values() if has_adapters(policy.model) else policy.model.parameters()
    sums = [p.detach().contiguous().view(_BITS[p.element_size()]).sum(dtype=torch.int64) for p in read]
    return tuple(int(s) for s in torch.stack(sums).tolist())


def write_weights(policy: Policy, directory: Path, dtype: torch.dtype, *, merge: bool = True) -> int:
    """Write config and weights with transformers, as some families store weights in another layout than in memory.

    Args:
        merge: add the adapters; otherwise the base alone is written.

    Returns the bytes of the weights.
    """
    policy.causal.save_pretrained(directory, state_dict=merged_state(policy, dtype, adapters=merge))
    return _weight_bytes(directory)


def write_adapters(policy: Policy, directory: Path) -> int:
    """Write the adapters in peft's layout, in float32. Returns their bytes."""
    policy.model.save_pretrained(directory)  # type: ignore[operator]
    return _weight_bytes(directory)


def remove_weights(directory: Path) -> None:
    """Remove the weights of a model directory, which vLLM has read; config and tokenizer stay."""
    for file in directory.glob("*.safetensors*"):
        file.unlink()


def _weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


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
