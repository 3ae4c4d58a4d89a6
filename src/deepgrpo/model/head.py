"""The head: a model's map from its last hidden state to logits, verified on the model itself.

Knowing it, log-probs can be computed in chunks without full logits.

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

from deepgrpo.model.logprobs import distance
from deepgrpo.model.narrow import NarrowLinear

SCALE_NAMES = (
    "logits_scaling",  # Granite, MiniCPM3 and HyperCLOVA X: two divide by it, one multiplies
    "logit_scale",  # Cohere
    "lm_head_multiplier",  # Falcon-H1
    "output_multiplier",  # Muse
    "logits_mup_width_multiplier",  # Inkling
)
"""Config names of a constant that multiplies or divides the logits."""

SOFTCAP_NAMES = (
    "final_logit_softcapping",  # Gemma and most others
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
)
"""Config names of the c in c tanh(z / c)."""


@dataclass(frozen=True, slots=True)
class Head:
    """Constants of a model's logits for the last hidden state h: cap(scale (h Wᵀ + b)), cap(y) = softcap tanh(y / softcap).

    W and b are read from the output layer at each use, since an optimizer or a peft adapter may replace them.
    """

    scale: float = 1.0
    softcap: float | None = None
    """None: no cap."""

    def finish(self, raw: Tensor) -> Tensor:
        """Logits from the result of the output layer."""
        if self == Head():
            return raw
        # tanh in bf16 has only a few dozen values near the cap
        scaled = raw.to(torch.promote_types(raw.dtype, torch.float32)) * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def find_head(causal: Any) -> tuple[Head | None, str]:
    """Find the head of a Hugging Face causal LM. Returns None and the reason if it is not known.

    Scales and soft caps from the config are verified on a few tokens. Logits of ordinary size cannot reveal a cap: under a
    cap of 30 a logit of 0.1 moves by 4e-7. So the model runs a second time with the result of its output layer replaced by
    numbers from 1e-3 to 1e5, and its logits must match our formula for each of them.
    """
    layer = causal.get_output_embeddings()
    kind = type(layer)
    if kind not in (nn.Linear, NarrowLinear):
        return None, f"its output layer is a {kind.__module__}.{kind.__qualname__} and no plain torch.nn.Linear"
    if causal.base_model is causal:
        return None, "it has no backbone apart from its output layer"
    known = {id(p) for part in (causal.base_model, layer) for p in part.parameters()}
    others = [name for name, p in causal.named_parameters() if p.requires_grad and id(p) not in known]
    if others:  # such as a learned scale, which may have no effect until trained
        return None, f"it trains weights outside its backbone and its output layer: {', '.join(others[:3])}"
    if layer.weight.is_meta:  # a meta policy cannot run: assume a plain head
        return Head(), ""
    training = causal.training
    try:
        causal.eval()
        return _prove_head(causal, layer)
    except Exception as error:  # a model's own code may raise anything; its full logits may still work
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
    weight = layer.weight.to(seen.dtype)
    if not _same(raw, F.linear(seen, weight, layer.bias)):
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
    if not _same(logits, head.finish(F.linear(hidden, weight, layer.bias))):
        return None, "its logits are not those of its output layer applied to its last hidden state"
    return head, ""


def _run_with(
    causal: Any, layer: nn.Linear, inputs: dict[str, Any], output: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the model. Returns its logits, and the input and result of its output layer, which `output` may replace."""
    seen: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Tensor, ...], given: Tensor) -> Tensor | None:
        seen[:] = [args[0], given]
        return output

    hook = layer.register_forward_hook(record)
    try:
        logits: Tensor = causal(**inputs).logits
    finally:
        hook.remove()
    return (logits, seen[0], seen[1]) if seen else (logits, None, None)


def _same(a: Tensor, b: Tensor) -> bool:
    # relative to the largest value: hidden states may be small everywhere; logits of -inf mask a token
    size = b.abs().where(b.isfinite(), 0.0).max() if b.numel() else 0.0
    return a.shape == b.shape and float(distance(a.float(), b.float())) <= 1e-4 * float(size)


def _constants(config: Any) -> tuple[list[float], list[float | None]]:
    """Candidate scales and soft caps from the config, with no scale and no cap first."""

    def named(names: Sequence[str]) -> list[float]:
        values = [getattr(owner, name, None) for owner in (config, config.get_text_config()) for name in names]
        return [float(v) for v in values if isinstance(v, int | float) and 0 < v < math.inf]

    scales = [1.0]
    for value in named(SCALE_NAMES):
        scales += [value, 1 / value]
    for width, base in zip(named(["hidden_size"]), named(["dim_model_base"]), strict=False):
        scales.append(base / width)  # MiniCPM, which ships its own code
    return list(dict.fromkeys(scales)), [None, *dict.fromkeys(named(SOFTCAP_NAMES))]
