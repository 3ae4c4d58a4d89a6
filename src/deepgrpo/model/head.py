"""How logits come from hidden states: found out on the model itself, so that log-probs need not go through full logits.

Shapes: N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE_NAMES = (
    "logits_scaling",  # Granite, MiniCPM3 and HyperCLOVA X: two divide by it, one multiplies
    "logit_scale",  # Cohere
    "lm_head_multiplier",  # Falcon-H1
    "output_multiplier",  # Muse
    "logits_mup_width_multiplier",  # Inkling
)
"""What families call a constant that multiplies or divides their logits."""

SOFTCAP_NAMES = (
    "final_logit_softcapping",  # Gemma and most others
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)
"""What they call the c of c tanh(z / c)."""


@dataclass(frozen=True, slots=True)
class Head:
    """How a model makes logits of its last hidden state h: cap(scale (h Wᵀ + b)), cap(y) = softcap tanh(y / softcap).

    Only the constants are kept. W and b are those of the output layer, read anew whenever they are used: an optimizer or
    a peft adapter may put others in their place.
    """

    scale: float = 1.0
    softcap: float | None = None
    """None: no cap."""

    def finish(self, raw: Tensor) -> Tensor:
        """Logits of what the output layer gave."""
        if self == Head():
            return raw
        # tanh in bf16 has a few dozen steps near the cap
        scaled = raw.to(torch.promote_types(raw.dtype, torch.float32)) * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def find_head(causal: Any) -> tuple[Head | None, str]:
    """How a Hugging Face causal LM makes logits of its last hidden state, or None and the reason why that is not known.

    Scales and soft caps are taken from the config and believed only if the model agrees, on a few tokens. Logits of a
    usual size cannot tell: under a cap of 30 a logit of 0.1 moves by 4e-7. So the model is run a second time with the
    output of its output layer replaced by numbers from 1e-3 to 1e5, and must make of each what our formula makes of it.
    """
    layer = causal.get_output_embeddings()
    kind = type(layer)
    if kind is not nn.Linear:
        return None, f"its output layer is a {kind.__module__}.{kind.__qualname__} and no plain torch.nn.Linear"
    if causal.base_model is causal:
        return None, "it has no backbone apart from its output layer"
    known = {id(p) for part in (causal.base_model, layer) for p in part.parameters()}
    others = [name for name, p in causal.named_parameters() if p.requires_grad and id(p) not in known]
    if others:  # such as a learned scale, which may show only after some training
        return None, f"it trains weights outside its backbone and its output layer: {', '.join(others[:3])}"
    if layer.weight.is_meta:  # a model without weights (outline.py) cannot be asked: its form is all there is
        return Head(), ""
    training = causal.training
    try:
        causal.eval()
        return _prove_head(causal, layer)
    except Exception as error:  # whatever a model's own code raises; its full logits may work all the same
        return None, f"the probe raised {type(error).__name__}: {str(error)[:120]}"
    finally:
        causal.train(training)


@torch.no_grad()
def _prove_head(causal: Any, layer: nn.Linear) -> tuple[Head | None, str]:
    device = next(causal.parameters()).device
    inputs: dict[str, Any] = {"input_ids": torch.arange(4, device=device)[None] % layer.weight.shape[0], "use_cache": False}
    logits, seen, raw = _run_with(causal, layer, inputs, None)
    if seen is None or raw is None:
        return None, "its output layer is not called where its logits are made"
    if not _same(raw, F.linear(seen, layer.weight, layer.bias)):
        return None, "its output layer does more than a product with its weights"
    hidden = causal.base_model(**inputs).last_hidden_state
    scales, softcaps = _constants(causal.config)
    before = next((scale for scale in scales if _same(seen, hidden * scale)), None)
    if before is None:
        return None, "its output layer does not see the last hidden state, nor a multiple of it that its config names"
    if before != 1.0 and layer.bias is not None:
        return None, "it scales hidden states before an output layer with a bias"
    magnitudes = torch.logspace(-3, 5, raw.numel(), device=raw.device, dtype=raw.dtype)
    mixed = torch.randperm(raw.numel(), generator=torch.Generator().manual_seed(0)).to(raw.device)
    wide = (magnitudes * (1 - 2 * (mixed % 2)))[mixed].view_as(raw)
    made, _, _ = _run_with(causal, layer, inputs, wide)
    after = next(
        (
            head for head in (Head(scale, cap) for cap in softcaps for scale in scales)
            if made.shape == wide.shape and torch.allclose(made.float(), head.finish(wide).float(), rtol=1e-5, atol=0.0)
        ),
        None,
    )  # fmt: skip
    if after is None:
        return None, "what it does to its logits is no scale or soft cap that its config names"
    head = Head(before * after.scale, after.softcap)
    if not _same(logits, head.finish(F.linear(hidden, layer.weight, layer.bias))):
        return None, "its logits are not those of its output layer applied to its last hidden state"
    return head, ""


def _run_with(
    causal: Any, layer: nn.Linear, inputs: dict[str, Any], output: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The model's logits, and what its output layer saw and gave, which `output` replaces if there is one."""
    noted: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], given: Tensor) -> Tensor | None:
        noted[:] = [args[0], given]
        return output

    hook = layer.register_forward_hook(note)
    try:
        logits: Tensor = causal(**inputs).logits
    finally:
        hook.remove()
    return (logits, noted[0], noted[1]) if noted else (logits, None, None)


def _same(a: Tensor, b: Tensor) -> bool:
    # measured by the largest value: hidden states may be small all over
    return a.shape == b.shape and float((a.float() - b.float()).abs().max()) <= 1e-4 * float(b.abs().max())


def _constants(config: Any) -> tuple[list[float], list[float | None]]:
    """Scales and soft caps that may be at work by the config, no scale and no cap first."""

    def named(names: Sequence[str]) -> list[float]:
        values = [getattr(owner, name, None) for owner in (config, config.get_text_config()) for name in names]
        return [float(v) for v in values if isinstance(v, int | float) and 0 < v < math.inf]

    scales = [1.0]
    for value in named(SCALE_NAMES):
        scales += [value, 1 / value]
    for width, base in zip(named(["hidden_size"]), named(["dim_model_base"]), strict=False):
        scales.append(base / width)  # MiniCPM, whose code comes along with its weights
    return list(dict.fromkeys(scales)), [None, *dict.fromkeys(named(SOFTCAP_NAMES))]
