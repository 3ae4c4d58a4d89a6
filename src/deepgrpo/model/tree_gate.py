"""May this model be packed? Asked of the model itself, on its device, before it is trained.

transformers accepts a registered attention name for models that never call it, and a mask that is forgotten turns into
silent document packing, so neither the config nor a trial of the log-probs alone is enough:

    static    the family takes attention functions; its layers attend (no recurrent state); no dropout; positions are
              not scaled by the length of the input
    layers    every layer must be seen to attend by our function; windows are read from what the layers and the mask
              maker hand over
    probe     a small tree against its paths one by one: log-probs and a gradient must agree. The gradient, as a kernel
              may be right forward and missing or wrong backward. Each kernel of the device is tried in its turn, the
              quickest first, and the first that passes serves
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepgrpo.model import tree_attention
from deepgrpo.model.tree_attention import Kernel, TreePlan

TOLERANCE = 2e-3
"""Largest difference of a log-prob in float32. A branch that lost its prefix is off by more than 1 in most models."""

GRADIENT_TOLERANCE = 1e-2
"""Largest relative difference of a gradient in float32."""

ROUNDING = 3.0
"""In a coarser dtype a pack may be this many times further from the float32 truth than single paths are."""


@dataclass(frozen=True, slots=True)
class PackingVerdict:
    """Whether a model can be packed, and why not."""

    packs: bool
    reason: str
    """What was found; also why a quicker kernel than the one that serves was refused."""
    kernel: Kernel = "cascade"
    window: int | None = None
    """Longest path that may be packed, in tokens; None: no limit but the context."""


# the picture of pack/tree.py with a prompt of 5: segments (start, end, until, parent), parents first
_SEGMENTS = ((0, 5, 22, -1), (5, 9, 19, 0), (9, 12, 12, 1), (12, 14, 14, 1), (14, 19, 19, 1), (19, 22, 22, 0))
_PATHS = ((0, 1, 2), (0, 1, 3), (0, 1, 4), (0, 5))

_STRETCH: dict[Kernel, int] = {"flex": 16}
"""How many times longer the tree of the probe is: flex takes 128 tokens at a time, so 22 would show it one block only."""


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
    """What the model says about the paths of the probe."""

    logprobs: tuple[Tensor, ...]
    """`[T, V]` per path, of the first 1000 tokens of the vocabulary at most."""
    gradients: tuple[Tensor, ...]
    """Of the sum of the log-probs of each path's own next tokens: a prefix counts once per path."""


def judge_model(causal: Any, dtype: torch.dtype = torch.float32, kernel: Kernel | None = None) -> PackingVerdict:
    """Decide whether `causal`, a Hugging Face causal LM, may be trained on tree packs.

    Its attention implementation is switched to ours if the verdict is yes, and left as it was if not. Nothing else of it
    changes: no `grad` is written, and what was frozen stays frozen.

    Args:
        dtype: the arithmetic of training. float32 is always tried, even if training is coarser.
        kernel: try only this one; None: those of the device, the quickest first.
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
                break  # whatever the kernel
            try:
                packs, reason = _try(causal, layer, dtype, candidate, before)
            except Exception as error:  # a kernel that this device, this head size or this version of torch lacks
                packs, reason = False, _raised(error)
            if packs:
                others = "".join(f"; {name} is not used: {why}" for name, why in refused.items())
                return PackingVerdict(True, reason + others, candidate, window)
            refused[candidate] = reason
    except Exception as error:  # whatever a model's own code raises: it cannot be packed
        reason = _raised(error)
    finally:
        causal.train(training)
        if not packs:
            causal.set_attn_implementation(before)
    if len(set(refused.values())) > 1:
        reason = "; ".join(f"{name}: {why}" for name, why in refused.items())
    return PackingVerdict(False, reason or "", candidates[-1])


def _try(causal: Any, layer: nn.Module, dtype: torch.dtype, kernel: Kernel, before: str) -> tuple[bool, str]:
    """Whether a kernel serves, and what was found. Leaves the model with our attention."""
    probe = _probe(causal, _STRETCH.get(kernel, 1))
    parameters = [p for p in layer.parameters() if p.is_floating_point()]
    if not parameters:
        return False, "its first attention layer has no weights, so no gradient can be tried"
    reason = ""
    truth: _Outcome | None = None
    # the layout is proved in float32, where a mistake cannot hide in the rounding; then in the dtype that is used
    for kind in dict.fromkeys((torch.float32, dtype)):
        with _differentiable(parameters):
            causal.set_attn_implementation(before)
            alone = _one_by_one(causal, probe, kind, parameters)
            causal.set_attn_implementation(tree_attention.NAME)
            packed = _packed(causal, probe, kind, parameters, kernel)
        truth = truth or alone
        coarse = kind != torch.float32
        rounding = (_worst(alone, truth), _apart(alone, truth, coarse))
        worst, apart = _worst(packed, truth), _apart(packed, truth, coarse)
        in_dtype = f" in {str(kind).removeprefix('torch.')}" if coarse else ""
        if not worst < TOLERANCE + ROUNDING * rounding[0]:
            return False, f"packed log-probs differ from those of single paths by {worst:.1e}{in_dtype}"
        if not apart < GRADIENT_TOLERANCE + ROUNDING * rounding[1]:
            return False, f"packed gradients differ from those of single paths by {apart:.1e} of their size{in_dtype}"
        reason = f"packed log-probs agree within {worst:.0e}, gradients within {apart:.0e}{in_dtype}"
    return True, reason


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


def _raised(error: Exception) -> str:
    return f"the probe raised {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:120]}"


def _probe(causal: Any, stretch: int) -> _Probe:
    """The tree with every segment `stretch` times as long."""
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
    """The first layer that attends by our function, the shortest window, and what is wrong. Leaves our attention."""
    seen: list[tuple[nn.Module, int | None]] = []
    causal.set_attn_implementation(tree_attention.NAME)
    with tree_attention.without_mask() as windows:
        _forward_pack(causal, _probe(causal, 1), "dense", seen)  # a kernel that runs everywhere
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
    """Each path alone."""
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
    """All paths as one pack."""
    with _autocast(causal, dtype), tree_attention.without_mask():
        logits = _forward_pack(causal, probe, kernel)
    return _outcome(logits, probe.tokens, probe.paths, probe.paths, parameters)


def _outcome(
    logits: Tensor, tokens: Tensor, paths: Sequence[Tensor], rows: Sequence[Tensor], parameters: Sequence[nn.Parameter]
) -> _Outcome:
    """Log-probs and gradient of paths whose logits are at `rows`."""
    logprobs = torch.log_softmax(logits.float(), -1)
    loss = torch.stack([logprobs[at[:-1], tokens[path[1:]]].sum() for path, at in zip(paths, rows, strict=True)]).sum()
    # not backward(): a gradient that was left behind would be part of the first update
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return _Outcome(
        tuple(logprobs.detach()[at, :1000] for at in rows),
        tuple(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)),
    )


@contextlib.contextmanager
def _differentiable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, frozen parameters take a gradient as well: under adapters the whole layer is frozen."""
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _worst(got: _Outcome, truth: _Outcome) -> float:
    """Largest difference of a log-prob; NaN if there is one (max() of floats would lose it)."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(got.logprobs, truth.logprobs, strict=True)]).max())


def _apart(got: _Outcome, truth: _Outcome, coarse: bool) -> float:
    """Largest L2 distance of a parameter's gradient, relative to the gradient; NaN if there is one.

    Some gradients are zero but for rounding, such as that of a bias of the keys; so one below 1e-4 of the largest is
    measured against that, and in a coarse dtype all of them against the largest.
    """
    norms = torch.stack([b.float().norm() for b in truth.gradients])
    away = torch.stack([(a - b).float().norm() for a, b in zip(got.gradients, truth.gradients, strict=True)])
    floor = norms.max() * (1.0 if coarse else 1e-4)
    return float((away / norms.clamp_min(floor).clamp_min(1e-30)).max())
