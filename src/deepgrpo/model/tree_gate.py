"""Test of a model before training, on its device: can it be trained on tree packs, and by which kernel?

transformers accepts a registered attention name for models that never call it, and a missing mask silently turns into
document packing. So neither the config nor a comparison of log-probs alone is enough:

    static    the family supports attention functions; its layers attend (no recurrent state); no dropout; positions are
              not scaled by the length of the input
    layers    every layer must call our function; windows are read from the arguments of layers and mask function
    probe     a small tree against its paths one by one: log-probs and a gradient must agree, as a kernel may be right
              forward and missing or wrong backward. The kernels of the device are tried fastest first; the first that
              passes is used
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepgrpo.errors import first_line
from deepgrpo.model import tree_attention
from deepgrpo.model.logprobs import distance
from deepgrpo.model.tree_attention import Kernel, TreePlan

TOLERANCE = 2e-3
"""Largest difference of a log-prob in float32. A branch without its prefix is off by more than 1 in most models."""

GRADIENT_TOLERANCE = 1e-2
"""Largest relative difference of a gradient in float32."""

ROUNDING = 3.0
"""Largest error of a pack in a coarser dtype, as a multiple of the error of single paths; both relative to float32."""


@dataclass(frozen=True, slots=True)
class PackingVerdict:
    """Result of the test."""

    packs: bool
    reason: str
    """Findings, including why a faster kernel was rejected."""
    kernel: Kernel = "cascade"
    window: int | None = None
    """Longest path that may be packed, in tokens; None: no limit but the context."""


# the picture of pack/tree.py with a prompt of 5: segments (start, end, until, parent), parents first
_SEGMENTS = ((0, 5, 22, -1), (5, 9, 19, 0), (9, 12, 12, 1), (12, 14, 14, 1), (14, 19, 19, 1), (19, 22, 22, 0))
_PATHS = ((0, 1, 2), (0, 1, 3), (0, 1, 4), (0, 5))

_STRETCH: dict[Kernel, int] = {"flex": 16}
"""Factor on the length of the probe's tree: flex uses blocks of 128 tokens, so 22 tokens would test one block only."""


@dataclass(frozen=True, slots=True)
class _Probe:
    """The tree of the probe on the model's device."""

    tokens: Tensor
    """`[S]`."""
    positions: Tensor
    """`[S]` along the paths."""
    segments: tuple[tuple[int, int, int, int], ...]
    paths: tuple[Tensor, ...]
    """Packed indices of each path."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Log-probs and gradients on the paths of the probe."""

    logprobs: tuple[Tensor, ...]
    """`[T, V]` per path, of the first 1000 tokens of the vocabulary at most."""
    gradients: tuple[Tensor, ...]
    """Gradient of the summed log-probs of every path's next tokens; a prefix counts once per path."""


def judge_model(causal: Any, dtype: torch.dtype = torch.float32, kernel: Kernel | None = None) -> PackingVerdict:
    """Decide whether `causal`, a Hugging Face causal LM, may be trained on tree packs.

    If the verdict is yes, its attention implementation is switched to ours. Nothing else changes: no `grad` is written, and
    frozen parameters stay frozen.

    Args:
        dtype: dtype of training. float32 is always tested as well.
        kernel: the only kernel to test; None: those of the device, fastest first.
    """
    candidates = (kernel,) if kernel else tree_attention.kernels(next(causal.parameters()).device)
    reason = _static(causal)
    if reason:
        return PackingVerdict(False, reason, candidates[0])
    tree_attention.register()
    before = causal.config._attn_implementation
    training = causal.training
    refused: dict[Kernel, str] = {}
    packs = False
    try:
        causal.eval()
        layer, window, reason = _layers(causal)
        for candidate in candidates:
            if layer is None:
                break  # no kernel can help
            try:
                packs, reason = _test_kernel(causal, layer, dtype, candidate, before)
            except Exception as error:  # a kernel that this device, this head size or this version of torch lacks
                packs, reason = False, _raised(error)
            if packs:
                others = "".join(f"; {name} is not used: {why}" for name, why in refused.items())
                return PackingVerdict(True, reason + others, candidate, window)
            refused[candidate] = reason
    except Exception as error:  # a model's own code may raise anything; it cannot be packed
        reason = _raised(error)
    finally:
        causal.train(training)
        if not packs:
            causal.set_attn_implementation(before)
    if len(set(refused.values())) > 1:
        reason = "; ".join(f"{name}: {why}" for name, why in refused.items())
    return PackingVerdict(False, reason or "", candidates[-1])


def _test_kernel(causal: Any, layer: nn.Module, dtype: torch.dtype, kernel: Kernel, before: str) -> tuple[bool, str]:
    """Test one kernel. Returns (passed, findings). Leaves the model with our attention."""
    probe = _probe(causal, _STRETCH.get(kernel, 1))
    parameters = [p for p in layer.parameters() if p.is_floating_point()]
    if not parameters:
        return False, "its first attention layer has no weights, so no gradient can be tried"
    reason = ""
    truth: _Outcome | None = None
    # float32 first, where rounding cannot hide an error; then the dtype of training
    for kind in dict.fromkeys((torch.float32, dtype)):
        with _differentiable(parameters):
            causal.set_attn_implementation(before)
            alone = _one_by_one(causal, probe, kind, parameters)
            causal.set_attn_implementation(tree_attention.NAME)
            packed = _packed(causal, probe, kind, parameters, kernel)
        truth = truth or alone
        coarse = kind != torch.float32
        logprob_rounding, gradient_rounding = _logprob_error(alone, truth), _gradient_error(alone, truth, coarse)
        logprob_error, gradient_error = _logprob_error(packed, truth), _gradient_error(packed, truth, coarse)
        in_dtype = f" in {str(kind).removeprefix('torch.')}" if coarse else ""
        if not logprob_error < TOLERANCE + ROUNDING * logprob_rounding:
            return False, f"packed log-probs differ from those of single paths by {logprob_error:.1e}{in_dtype}"
        if not gradient_error < GRADIENT_TOLERANCE + ROUNDING * gradient_rounding:
            return False, f"packed gradients differ from those of single paths by {gradient_error:.1e} of their size{in_dtype}"
        reason = f"packed log-probs agree within {logprob_error:.0e}, gradients within {gradient_error:.0e}{in_dtype}"
    return True, reason


def _static(causal: Any) -> str | None:
    """Reason against packing that follows from the config, or None."""
    config = causal.config.get_text_config()
    if not getattr(causal, "_supports_attention_backend", False):
        return "its family does not take attention functions"
    running = causal.config._attn_implementation
    if running not in ("sdpa", tree_attention.NAME):  # set by the recipe, or the only one that the family supports
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


def _raised(error: Exception) -> str:
    return f"the probe raised {type(error).__name__}: {first_line(error, 120)}"


def _probe(causal: Any, stretch: int) -> _Probe:
    """Build the tree with every segment `stretch` times as long."""
    device = next(causal.parameters()).device
    segments = tuple((stretch * a, stretch * b, stretch * c, parent) for a, b, c, parent in _SEGMENTS)
    own = [torch.arange(start, end) for start, end, _, _ in segments]
    paths = tuple(torch.cat([own[i] for i in path]) for path in _PATHS)
    positions = torch.zeros(segments[0][2], dtype=torch.long)
    for path in paths:
        positions[path] = torch.arange(len(path))
    vocabulary = min(causal.config.get_text_config().vocab_size, 1000)
    tokens = torch.randint(0, vocabulary, (len(positions),), generator=torch.Generator().manual_seed(0))
    return _Probe(tokens.to(device), positions.to(device), segments, tuple(path.to(device) for path in paths))


def _autocast(causal: Any, dtype: torch.dtype) -> Any:
    device = next(causal.parameters()).device.type
    return torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def _layers(causal: Any) -> tuple[nn.Module | None, int | None, str | None]:
    """Run the pack once. Returns the first attention layer, the shortest window, and a reason against packing.

    Leaves the model with our attention.
    """
    seen: list[tuple[nn.Module, int | None]] = []
    causal.set_attn_implementation(tree_attention.NAME)
    with tree_attention.without_mask() as windows:
        _forward_pack(causal, _probe(causal, 1), "dense", seen)  # runs on every device
    wanted, found = causal.config.get_text_config().num_hidden_layers, len({id(module) for module, _ in seen})
    if found != wanted:
        return None, None, f"only {found} of its {wanted} layers use our attention"
    limits = [w for w in (*windows, *(window for _, window in seen)) if w]
    return seen[0][0], min(limits, default=None), None


def _forward_pack(
    causal: Any, probe: _Probe, kernel: Kernel, seen: list[tuple[nn.Module, int | None]] | None = None
) -> Tensor:
    """Logits `[S, V]`."""
    plan = TreePlan(probe.segments, kernel, seen)
    logits: Tensor = causal(
        input_ids=probe.tokens[None], position_ids=probe.positions[None], use_cache=False, tree_plan=plan
    ).logits[0]
    return logits


@torch.enable_grad()
def _one_by_one(causal: Any, probe: _Probe, dtype: torch.dtype, parameters: Sequence[nn.Parameter]) -> _Outcome:
    """Forward and differentiate every path separately."""
    found = []
    for path in probe.paths:
        with _autocast(causal, dtype):
            logits = causal(input_ids=probe.tokens[path][None], use_cache=False).logits[0]
        rows = torch.arange(len(path), device=path.device)
        found.append(_outcome(logits, probe.tokens, [path], [rows], parameters))
    gradients = tuple(torch.stack(parts).sum(0) for parts in zip(*(one.gradients for one in found), strict=True))
    return _Outcome(tuple(one.logprobs[0] for one in found), gradients)


@torch.enable_grad()
def _packed(
    causal: Any, probe: _Probe, dtype: torch.dtype, parameters: Sequence[nn.Parameter], kernel: Kernel
) -> _Outcome:
    """Forward and differentiate all paths as one pack."""
    with _autocast(causal, dtype), tree_attention.without_mask():
        logits = _forward_pack(causal, probe, kernel)
    return _outcome(logits, probe.tokens, probe.paths, probe.paths, parameters)


def _outcome(
    logits: Tensor, tokens: Tensor, paths: Sequence[Tensor], rows: Sequence[Tensor], parameters: Sequence[nn.Parameter]
) -> _Outcome:
    """Log-probs and gradients of paths whose logits are at `rows`."""
    logprobs = torch.log_softmax(logits.float(), -1)
    loss = torch.stack([logprobs[at[:-1], tokens[path[1:]]].sum() for path, at in zip(paths, rows, strict=True)]).sum()
    # not backward(): a leftover `grad` would enter the first update
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return _Outcome(
        tuple(logprobs.detach()[at, :1000] for at in rows),
        tuple(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)),
    )


@contextlib.contextmanager
def _differentiable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Enable gradients of frozen parameters: under adapters the whole layer is frozen."""
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _logprob_error(got: _Outcome, truth: _Outcome) -> float:
    """Largest difference of a log-prob; NaN if any is NaN (Python's max() would drop it)."""
    return float(torch.stack([distance(a, b) for a, b in zip(got.logprobs, truth.logprobs, strict=True)]).max())


def _gradient_error(got: _Outcome, truth: _Outcome, coarse: bool) -> float:
    """Largest relative L2 distance between gradients of a parameter; NaN if any is NaN.

    Some gradients are zero up to rounding, such as that of a key bias. So the denominator is at least 1e-4 of the largest
    norm, and in a coarse dtype it is the largest norm.
    """
    norms = torch.stack([b.float().norm() for b in truth.gradients])
    away = torch.stack([(a - b).float().norm() for a, b in zip(got.gradients, truth.gradients, strict=True)])
    floor = norms.max() * (1.0 if coarse else 1e-4)
    return float((away / norms.clamp_min(floor).clamp_min(1e-30)).max())
