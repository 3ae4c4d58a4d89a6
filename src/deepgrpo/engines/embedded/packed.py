"""Linear layers whose weights lie as the processor's matrix units want them.

A plain bfloat16 product on a CPU brings its weights into blocks anew at every call, which for a few rows costs as much as
the product. Weights that only sampling reads can be laid out once per policy instead: half the time of a decoding step's
products on processors with AMX. By oneDNN's operators in torch, which its compiler uses for the same purpose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_ops: Any = torch.ops.mkldnn


class PackedLinear(nn.Module):
    """`x Wᵀ + b` with the weight in blocks.

    Args:
        source: the layer whose weights it follows; `refresh` takes them over.
        dtype: of the product.
    """

    def __init__(self, source: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        # in tuples, so that no one takes them for its own parameters
        self._source, self.dtype = (source,), dtype
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the present weights of the source."""
        (source,) = self._source
        self._packed: Tensor = _ops._reorder_linear_weight(source.weight.detach().to(self.dtype).contiguous())
        self._bias = None if source.bias is None else source.bias.detach().to(self.dtype)

    def forward(self, given: Tensor) -> Tensor:
        result: Tensor = _ops._linear_pointwise(given, self._packed, self._bias, "none", [], "")
        return result


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch and this processor pack: tried on a small product."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    try:
        if not _ops._is_mkldnn_bf16_supported():
            return False
        # nothing random: the global stream belongs to the run, which has to resume to the same numbers
        layer = nn.utils.skip_init(nn.Linear, 32, 48)
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-0.2, 0.2, 48 * 32).view(48, 32))
            layer.bias.copy_(torch.linspace(-1, 1, 48))
            given = torch.linspace(-1, 1, 3 * 5 * 32).view(3, 5, 32)
            got = PackedLinear(layer, dtype)(given.to(dtype)).float()
            return bool(torch.allclose(got, layer(given), atol=0.05))
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False  # private operators: another torch may have others
