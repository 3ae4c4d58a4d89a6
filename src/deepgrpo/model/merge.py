"""Weights of a policy as those of a plain model: adapters merged into the layers that they adapt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepgrpo.model.policy import Policy


@torch.no_grad()
def merged_state(policy: Policy, dtype: torch.dtype, *, adapters: bool = True) -> dict[str, Tensor]:
    """Weights of the model in another dtype, by module name; adapters are merged in float32, or left out.

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
        if name in adapted and adapters:
            tensor = (value.float() + _delta(adapted[name])).to(dtype).cpu()
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
