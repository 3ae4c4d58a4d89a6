"""Linear layers with weights packed for the CPU's matrix units.

A plain bfloat16 product on a CPU reorders its weights into blocks at every call, which for a few rows costs as much as the
product. Weights that only sampling reads are packed once per policy instead, which halves the time of a decoding step's
products on CPUs with AMX. It uses the oneDNN operators of torch that torch.compile uses for the same purpose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepgrpo.model.narrow import NarrowLinear

OPERATORS: Any = torch.ops.mkldnn


class PackedLinear(nn.Module):
    """`x Wᵀ + b` with a packed weight.

    Args:
        source: layer whose weights it copies; `refresh` copies them again.
        dtype: dtype of the product.
    """

    def __init__(self, source: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        # in a tuple, so that nn.Module does not register the source as a submodule
        self._source, self.dtype = (source,), dtype
        self._pack()

    def refresh(self) -> None:
        """Copy the current weights of the source; those of a narrow one never change."""
        if not isinstance(self._source[0], NarrowLinear):
            self._pack()

    @torch.no_grad()
    def _pack(self) -> None:
        (source,) = self._source
        self._packed: Tensor = OPERATORS._reorder_linear_weight(source.weight.detach().to(self.dtype).contiguous())
        self._bias = None if source.bias is None else source.bias.detach().to(self.dtype)

    def forward(self, given: Tensor) -> Tensor:
        result: Tensor = OPERATORS._linear_pointwise(given, self._packed, self._bias, "none", [], "")
        return result


def supports_packing(device: torch.device, dtype: torch.dtype) -> bool:
    """Check on a small product that this torch and CPU support packing."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    try:
        if not OPERATORS._is_mkldnn_bf16_supported():
            return False
        # nothing random: the global stream belongs to the run, which must resume to the same numbers
        layer = nn.utils.skip_init(nn.Linear, 32, 48)
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-0.2, 0.2, 48 * 32).view(48, 32))
            layer.bias.copy_(torch.linspace(-1, 1, 48))
            given = torch.linspace(-1, 1, 3 * 5 * 32).view(3, 5, 32)
            got = PackedLinear(layer, dtype)(given.to(dtype)).float()
            return bool(torch.allclose(got, layer(given), atol=0.05))
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False  # private operators: other versions of torch may lack them
