"""Draw tokens from logits and given uniforms.

Inverse CDF: the drawn token is the first whose cumulative probability exceeds u. One uniform per token makes a row's draw
a function of its own logits and counter, and for a large vocabulary it is far cheaper than `torch.multinomial`. The
cumulative sum runs over blocks first, then inside one block: over a whole vocabulary it cannot be vectorized and would cost
more than the softmax.

Shapes: B rows, V vocabulary, N blocks of C tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepgrpo.engines.base import SamplingParams

BLOCK = 128
"""Tokens per block of the two-level search."""


def draw(
    logits_BV: Tensor, uniforms_B: Tensor, params: SamplingParams, seen_BV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits_BV: unscaled logits.
        uniforms_B: float64 in [0, 1), one per row, on the CPU or the device (ignored when greedy).
        params: the distribution, or greedy.
        seen_BV: True for tokens that occur in the row so far, prompt included; needed with a repetition penalty.

    Returns:
        `[B]` token ids and `[B]` log-probs under the sampling distribution: repetition penalty and temperature applied, and
        renormalized over the tokens that top-k, min-p or top-p leave. Greedy takes the most likely token and reports its
        log-prob at temperature 1.
    """
    logits_BV = logits_BV.float()
    if params.greedy:
        tokens_B = logits_BV.argmax(-1)
        return tokens_B, _pick(logits_BV, tokens_B) - torch.logsumexp(logits_BV, -1)
    if params.repetition_penalty != 1.0:
        assert seen_BV is not None
        logits_BV = penalise(logits_BV, seen_BV, params.repetition_penalty)
    if params.temperature != 1.0:
        logits_BV = logits_BV / params.temperature
    if params.top_k is not None:
        least_B1 = logits_BV.topk(min(params.top_k, logits_BV.shape[1]), -1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    probability_BV = torch.softmax(logits_BV, -1)
    if params.min_p > 0.0:
        probability_BV = probability_BV * (probability_BV >= params.min_p * probability_BV.amax(-1, keepdim=True))
    if params.top_p < 1.0:
        probability_BV = probability_BV * nucleus(probability_BV, params.top_p)
    if probability_BV.device.type == "mps":  # which has no float64
        tokens_B, total_B = (found.to(probability_BV.device) for found in _invert(probability_BV.cpu(), uniforms_B))
    else:
        tokens_B, total_B = _invert(probability_BV, uniforms_B)
    # NaN logits leave no token to find; the log-prob is then NaN, which the engine reports
    tokens_B = tokens_B.clamp_(max=logits_BV.shape[1] - 1)
    return tokens_B, torch.log(_pick(probability_BV, tokens_B) / total_B)


def _invert(probability_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """The first token of each row whose cumulative probability exceeds u · total, and the totals."""
    vocabulary = probability_BV.shape[1]
    padding = -vocabulary % BLOCK
    padded_BV = F.pad(probability_BV, (0, padding)) if padding else probability_BV
    blocks_BNC = padded_BV.view(len(padded_BV), -1, BLOCK)
    cumulative_BN = blocks_BNC.sum(-1).double().cumsum(-1)
    total_B = cumulative_BN[:, -1]
    # u < 1, but u * total may round up to total, and then no token would exceed it
    aim_B = torch.minimum(uniforms_B.to(total_B) * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    block_B = torch.searchsorted(cumulative_BN, aim_B[:, None], right=True).squeeze(1).clamp_(max=cumulative_BN.shape[1] - 1)
    rows_B = torch.arange(len(block_B), device=block_B.device)
    before_B = torch.where(block_B > 0, cumulative_BN[rows_B, (block_B - 1).clamp_(min=0)], 0.0)
    inside_BC = blocks_BNC[rows_B, block_B].double()
    cumulative_BC = inside_BC.cumsum(-1)
    # the block's sum was rounded: the target may fall at or beyond the block's last token of nonzero probability
    end_B = cumulative_BC[:, -1]
    rest_B = torch.minimum(aim_B - before_B, torch.nextafter(end_B, torch.zeros_like(end_B)))
    inside_B = torch.searchsorted(cumulative_BC, rest_B[:, None], right=True).squeeze(1)
    return block_B * BLOCK + inside_B, total_B.to(probability_BV.dtype)


def penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Logits with those of seen tokens divided by the penalty if positive, else multiplied by it (arXiv:1909.05858)."""
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def nucleus(probability_BV: Tensor, top_p: float) -> Tensor:
    """The smallest set of most likely tokens whose mass reaches `top_p`, as a boolean `[B, V]`.

    A token belongs to it if the tokens ranked above it hold less than `top_p`, so the set is never empty.
    """
    ranked_BV, order_BV = torch.sort(probability_BV, dim=-1, descending=True, stable=True)
    before_BV = ranked_BV.cumsum(-1) - ranked_BV
    return torch.zeros_like(probability_BV, dtype=torch.bool).scatter_(1, order_BV, before_BV < top_p)


def _pick(values_BV: Tensor, tokens_B: Tensor) -> Tensor:
    return values_BV.gather(1, tokens_B[:, None]).squeeze(1)
