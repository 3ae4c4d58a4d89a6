"""May this model be packed? Asked of the model itself, on its device, before it is trained.

transformers accepts a registered attention name for models that never call it, and a mask that is forgotten turns into
silent document packing, so neither the config nor a trial of the log-probs alone is enough:

    static    the family takes attention functions; its layers attend (no recurrent state); no dropout; positions are
              not scaled by the length of the input
    probe     a small tree against its paths one by one: every layer must be seen to attend by our function, and the
              log-probs must agree; windows are read from what the layers and the mask maker hand over
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepgrpo.model import tree_attention
from deepgrpo.model.tree_attention import Backend, TreePlan

TOLERANCE = 2e-3
"""Largest difference of a log-prob in float32. A branch that lost its prefix is off by more than 1 in most models."""

ROUNDING = 3.0
"""In a coarser dtype a pack may be this many times further from the float32 truth than single paths are."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a model can be packed, and why not."""

    packs: bool
    reason: str
    backend: Backend = "cascade"
    window: int | None = None
    """Longest path that may be packed, in tokens; None: no limit but the context."""


# the picture of pack/tree.py with a prompt of 5: segments (start, end, until, parent) and positions along the paths
_SEGMENTS = ((0, 5, 22, -1), (5, 9, 19, 0), (9, 12, 12, 1), (12, 14, 14, 1), (14, 19, 19, 1), (19, 22, 22, 0))
_POSITIONS = (*range(5), *range(5, 9), *range(9, 12), *range(9, 11), *range(9, 14), *range(5, 8))
_PATHS = ((0, 1, 2), (0, 1, 3), (0, 1, 4), (0, 5))


def judge_model(causal: Any, dtype: torch.dtype = torch.float32, backend: Backend | None = None) -> Verdict:
    """Decide whether `causal`, a Hugging Face causal LM, may be trained on tree packs.

    Its attention implementation is switched to ours if the verdict is yes, and left as it was if not.
    """
    backend = backend or tree_attention.default_backend(next(causal.parameters()).device)
    reason = _static(causal)
    if reason:
        return Verdict(False, reason, backend)
    tree_attention.register()
    before = causal.config._attn_implementation
    training = causal.training
    try:
        causal.eval()
        expected = _one_by_one(causal, torch.float32)
        rounding = 0.0 if dtype == torch.float32 else _worst(_one_by_one(causal, dtype), expected)
        causal.set_attn_implementation(tree_attention.NAME)
        # the layout is proved in float32, where a mistake cannot hide in the rounding; then in the dtype that is used
        verdict = _probe(causal, torch.float32, backend, expected, TOLERANCE)
        if verdict.packs and rounding:
            verdict = _probe(causal, dtype, backend, expected, TOLERANCE + ROUNDING * rounding)
    except Exception as error:  # whatever a model's own code raises: it cannot be packed
        verdict = Verdict(False, f"the probe raised {type(error).__name__}: {str(error)[:120]}", backend)
    finally:
        causal.train(training)
    if not verdict.packs:
        causal.set_attn_implementation(before)
    return verdict


def _static(causal: Any) -> str | None:
    """A reason against packing that the config gives away, or None."""
    config = causal.config.get_text_config()
    if not getattr(causal, "_supports_attention_backend", False):
        return "its family does not take attention functions"
    running = causal.config._attn_implementation
    if running not in ("sdpa", tree_attention.NAME):  # chosen by the recipe, or all that the family can
        return f'its attention runs as "{running}"'
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        return f"it has layers of type {', '.join(sorted(others))}"
    if getattr(config, "attention_dropout", 0.0):
        return f"it drops attention (attention_dropout = {config.attention_dropout})"
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}
    if kinds & {"dynamic", "longrope"}:
        return "its positions are scaled by the length of the input (dynamic RoPE)"
    return None


def _tokens(causal: Any) -> Tensor:
    vocabulary = min(causal.config.get_text_config().vocab_size, 1000)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (len(_POSITIONS),), generator=generator).to(next(causal.parameters()).device)


def _autocast(causal: Any, dtype: torch.dtype) -> Any:
    device = next(causal.parameters()).device.type
    return torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)


def _own(index: int) -> range:
    start, end, _, _ = _SEGMENTS[index]
    return range(start, end)


@torch.no_grad()
def _one_by_one(causal: Any, dtype: torch.dtype) -> list[Tensor]:
    """Log-softmax `[T, V]` of each path alone."""
    tokens = _tokens(causal)
    found = []
    with _autocast(causal, dtype):
        for path in _PATHS:
            index = torch.tensor([i for segment in path for i in _own(segment)], device=tokens.device)
            logits = causal(input_ids=tokens[index][None], use_cache=False).logits[0]
            found.append(torch.log_softmax(logits.float(), -1))
    return found


def _worst(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(got, truth, strict=True))


@torch.no_grad()
def _probe(
    causal: Any, dtype: torch.dtype, backend: Backend, expected: Sequence[Tensor], tolerance: float
) -> Verdict:
    tokens = _tokens(causal)
    seen: list[tuple[int, int | None]] = []
    plan = TreePlan(_SEGMENTS, backend, seen)
    with _autocast(causal, dtype), tree_attention.without_mask() as windows:
        logits = causal(
            input_ids=tokens[None], position_ids=torch.tensor([_POSITIONS], device=tokens.device), use_cache=False,
            tree_plan=plan,
        ).logits[0]  # fmt: skip
    got = torch.log_softmax(logits.float(), -1)
    layers = causal.config.get_text_config().num_hidden_layers
    if len({layer for layer, _ in seen}) != layers:
        return Verdict(False, f"only {len({layer for layer, _ in seen})} of its {layers} layers use our attention", backend)
    worst = _worst([got[[i for segment in path for i in _own(segment)]] for path in _PATHS], expected)
    if not worst < tolerance:
        return Verdict(False, f"packed log-probs differ from those of single paths by {worst:.1e}", backend)
    limits = [w for w in (*windows, *(window for _, window in seen)) if w]
    return Verdict(True, f"packed log-probs agree within {worst:.0e}", backend, min(limits, default=None))
