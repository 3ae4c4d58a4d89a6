"""Log-probs of chosen tokens from hidden states, without ever holding `[tokens, vocabulary]`.

Logits exist for `chunk` rows at a time, in the forward and again in the backward pass. For N = 18,432 positions and
a vocabulary of 152k the full matrix would take 11 GB in float32; a chunk of 512 rows takes 0.3 GB.

Shapes: N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ChunkedLogSoftmax(torch.autograd.Function):
    """log softmax(cap(s (h Wᵀ + b)) / T)[target], chunk by chunk, with the gradient written out.

    Without a soft cap cap(y) = y, with one cap(y) = c tanh(y / c), whose slope is 1 - tanh²(y / c). With p = softmax(z),
    z = cap(y) / T, y = s (h Wᵀ + b) and upstream gradient g: dL/dz = g · (onehot(target) - p), and dL/d(h Wᵀ + b) is
    dL/dz · s / T, with a cap times 1 - (z T / c)².
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor,
        scale: float, softcap: float | None, temperature: float, chunk: int, with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows = hidden_NH.shape[0]
        # bf16 logits lose three digits of a log-prob: the log-sum-exp is always taken in float32 or better
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        logprob_N = hidden_NH.new_empty(rows, dtype=dtype)
        lse_N = hidden_NH.new_empty(rows, dtype=dtype)
        entropy_N = hidden_NH.new_zeros(rows, dtype=dtype)
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            logits = _logits(hidden_NH[part], weight_VH, bias_V, scale, softcap, temperature, dtype)
            lse = torch.logsumexp(logits, -1)
            logprob_N[part] = logits.gather(1, target_N[part, None]).squeeze(1) - lse
            lse_N[part] = lse
            if with_entropy:  # H = lse - Σ p z
                probability = torch.exp(logits - lse[:, None])
                entropy_N[part] = lse - torch.linalg.vecdot(probability, logits)
                del probability
            del logits  # or this chunk would be held while the next one is made
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, target_N, lse_N)
        ctx.scale, ctx.softcap, ctx.temperature, ctx.chunk = scale, softcap, temperature, chunk
        ctx.mark_non_differentiable(entropy_N)
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, target_N, lse_N = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_NH) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VH) if need_weight else None
        grad_bias = torch.zeros_like(bias_V) if need_bias else None
        for start in range(0, hidden_NH.shape[0], ctx.chunk):
            part = slice(start, min(start + ctx.chunk, hidden_NH.shape[0]))
            hidden, grad = hidden_NH[part], grad_N[part]
            logits = _logits(hidden, weight_VH, bias_V, ctx.scale, ctx.softcap, ctx.temperature, lse_N.dtype)
            # the slope of a soft cap needs the logits beside p, hence a second buffer; otherwise p takes their place
            shifted = logits.sub_(lse_N[part, None]) if ctx.softcap is None else logits - lse_N[part, None]
            grad_logits = shifted.exp_().mul_(-grad[:, None])
            grad_logits[torch.arange(len(grad), device=grad.device), target_N[part]] += grad
            if ctx.softcap is not None:
                grad_logits.addcmul_(grad_logits, logits.square_(), value=-((ctx.temperature / ctx.softcap) ** 2))
            grad_logits = grad_logits.div_(ctx.temperature / ctx.scale).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ weight_VH.to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.t().to(weight_VH.dtype), hidden.to(weight_VH.dtype))
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            del logits, shifted, grad_logits
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def _logits(
    hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scale: float, softcap: float | None, temperature: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    # under autocast the hidden states are bf16 and the head's weights float32: multiply in bf16, go on in float32
    logits = (hidden @ weight_VH.to(hidden.dtype).t()).to(dtype)
    if bias_V is not None:
        logits += bias_V
    if softcap is not None:
        return logits.div_(softcap / scale).tanh_().mul_(softcap / temperature)
    return logits.div_(temperature / scale) if temperature != scale else logits


def chunked_logprobs(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor,
    *, scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0, chunk: int = 512,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probs of `target_N` and, if asked for, the entropy of each row's distribution.

    Args:
        hidden_NH: `[N, H]` last hidden states of the rows that predict a target.
        weight_VH, bias_V: the output head; tied or not.
        target_N: `[N]` token ids.
        scale: what the head gives is multiplied by it.
        softcap: then it is bent to `c tanh(y / c)`; None leaves it as it is.
        temperature: logits are divided by it at last, as in sampling.
        chunk: rows of logits that exist at a time.
        with_entropy: also compute `-Σ p log p`, in nats; it carries no gradient.

    Returns:
        `[N]` log-probs (float32 or better, differentiable) and `[N]` entropies (zeros if not asked for).
    """
    with torch.autocast(hidden_NH.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _ChunkedLogSoftmax.apply(
            hidden_NH, weight_VH, bias_V, target_N, scale, softcap, temperature, chunk, with_entropy
        )
    return result
