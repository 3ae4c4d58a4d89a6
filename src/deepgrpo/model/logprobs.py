"""Log-probs of chosen tokens from hidden states, without ever holding `[tokens, vocabulary]`.

Logits exist for `chunk` rows at a time, in the forward and again in the backward pass. For N = 18,432 positions and
a vocabulary of 152k the full matrix would take 11 GB in float32; a chunk of 256 rows takes 0.16 GB. Recomputing logits
costs a fourth matrix product beside three; the first chunks, up to a fixed memory, are saved instead of recomputed.

Shapes: N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor


class _ChunkedLogSoftmax(torch.autograd.Function):
    """log softmax(cap(s (h Wᵀ + b)) / T)[target], chunk by chunk, with an explicit gradient.

    Without a soft cap cap(y) = y, with one cap(y) = c tanh(y / c), whose slope is 1 - tanh²(y / c). With p = softmax(z),
    z = cap(y) / T, y = s (h Wᵀ + b) and upstream gradient g: dL/dz = g · (onehot(target) - p), and dL/d(h Wᵀ + b) =
    a ∘ (onehot(target) - p) with a = g s / T, with a cap times 1 - (z T / c)².

    Each elementwise pass over `[chunk, V]` costs a sixth of a matrix product with a hidden size of 512, so there are few: a
    scales the hidden states and the results instead of p, and the one-hot term is added row by row.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor,
        scale: float, softcap: float | None, temperature: float, chunk: int, with_entropy: bool, keep_bytes: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows = hidden_NH.shape[0]
        # bf16 logits would cost three digits of a log-prob: the log-sum-exp is in float32 or better
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        logprob_N = hidden_NH.new_empty(rows, dtype=dtype)
        entropy_N = hidden_NH.new_zeros(rows, dtype=dtype)
        # cast once: a cast per chunk would read as much memory as the product itself
        weight = weight_VH.to(hidden_NH.dtype)
        saved: list[Tensor] = []
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            logits = _logits(hidden_NH[part], weight, bias_V, scale, softcap, temperature, dtype)
            keep = softcap is None and (len(saved) + 1) * logits.nbytes <= keep_bytes and len(saved) == start // chunk
            log_p = torch.log_softmax(logits, -1, out=logits)  # in place
            logprob_N[part] = log_p.gather(1, target_N[part, None]).squeeze(1)
            if with_entropy:
                probability = torch.exp(log_p)
                if bias_V is not None:  # a bias of -inf masks a token: 0 log 0 is 0, and not NaN
                    log_p.clamp_(min=torch.finfo(dtype).min)
                entropy_N[part] = -torch.linalg.vecdot(probability, log_p)
                if keep:
                    saved.append(probability)
                del probability
            elif keep:
                saved.append(log_p.exp_())
            del logits, log_p  # free this chunk before the next one is computed
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, target_N)
        ctx.scale, ctx.softcap, ctx.temperature, ctx.chunk, ctx.saved = scale, softcap, temperature, chunk, saved
        ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, target_N = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_NH) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VH) if need_weight else None
        grad_bias = torch.zeros_like(bias_V) if need_bias else None
        weight = weight_VH.to(hidden_NH.dtype)
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        # consumed in order; a second backward pass recomputes them
        saved, ctx.saved = deque(ctx.saved), []
        for start in range(0, hidden_NH.shape[0], ctx.chunk):
            part = slice(start, min(start + ctx.chunk, hidden_NH.shape[0]))
            hidden, target = hidden_NH[part], target_N[part]
            upstream = grad_N[part, None] * (ctx.scale / ctx.temperature)
            at_target = upstream
            if saved:
                probability = saved.popleft()
            else:
                logits = _logits(hidden, weight, bias_V, ctx.scale, ctx.softcap, ctx.temperature, dtype)
                if ctx.softcap is None:
                    probability = torch.softmax(logits, -1, out=logits)
                else:
                    probability = torch.softmax(logits, -1)
                    slope = logits.mul_(ctx.temperature / ctx.softcap).square_().neg_().add_(1)
                    at_target = upstream * slope.gather(1, target[:, None])
                    probability.mul_(slope)
                    del slope
                del logits
            factor = probability.to(hidden.dtype)
            del probability
            if grad_hidden is not None:
                row = (factor @ weight).to(dtype).mul_(-upstream)
                grad_hidden[part] = row.addcmul_(weight[target].to(dtype), at_target)
            if grad_weight is not None:
                _add_product(grad_weight, factor.t(), (hidden * -upstream).to(hidden.dtype))
                grad_weight.index_add_(0, target, (hidden * at_target).to(grad_weight.dtype))
            if grad_bias is not None:
                grad_bias -= (factor.t() @ upstream.to(factor.dtype)).squeeze(1)
                grad_bias.index_add_(0, target, at_target.squeeze(1).to(grad_bias.dtype))
            del factor
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total`; the factors may have a coarser dtype, the sum over chunks does not."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _logits(
    hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None, temperature: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    # under autocast the hidden states are bf16: multiply in bf16, continue in float32
    logits = (hidden @ weight_VH.t()).to(dtype)
    if bias_V is not None:
        logits += bias_V
    if softcap is not None:
        return logits.div_(softcap / scale).tanh_().mul_(softcap / temperature)
    return logits.div_(temperature / scale) if temperature != scale else logits


def entropy(log_p_NV: Tensor) -> Tensor:
    """Entropy `[N]` of distributions given by their log-probs, in nats. A masked token, with a log-prob of -inf, adds 0."""
    return -(log_p_NV.exp() * log_p_NV.clamp(min=torch.finfo(log_p_NV.dtype).min)).sum(-1)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Largest absolute difference of two tensors of log-probs or logits; NaN if either has one.

    Equal infinities are equal: both say that a token is masked.
    """
    return torch.where(a == b, 0.0, a - b).abs().max()


def chunked_logprobs(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor,
    *, scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0, chunk: int = 512,
    with_entropy: bool = False, keep_bytes: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probs of `target_N` and, with `with_entropy`, the entropy of each row's distribution.

    Args:
        hidden_NH: `[N, H]` last hidden states at the positions that predict a target.
        weight_VH, bias_V: output layer, tied or not.
        target_N: `[N]` token ids.
        scale: factor of the output layer's result.
        softcap: c of the soft cap `c tanh(y / c)`; None: no cap.
        temperature: divides the capped logits, as in sampling.
        chunk: rows of logits held in memory at a time.
        with_entropy: also compute `-Σ p log p`, in nats, without a gradient.
        keep_bytes: memory for probabilities saved for the backward pass; the rest is recomputed.

    Returns:
        `[N]` log-probs (float32 or better, differentiable) and `[N]` entropies (zeros unless `with_entropy`).
    """
    with torch.autocast(hidden_NH.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _ChunkedLogSoftmax.apply(
            hidden_NH, weight_VH, bias_V, target_N, scale, softcap, temperature, chunk, with_entropy,
            keep_bytes if torch.is_grad_enabled() else 0,
        )
    return result
