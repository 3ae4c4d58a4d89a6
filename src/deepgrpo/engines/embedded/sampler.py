"""Draw tokens from logits with uniforms that are handed in.

Inverse CDF: the drawn token is the first whose cumulative probability exceeds u. It needs one uniform per token, so a
row's draw is a function of its own logits and its own counter; and it is far cheaper than `torch.multinomial` for a
large vocabulary (0.8 against 9 ms for 40 rows of 8k, 19 against 163 ms at 152k).

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepgrpo.engines.base import SamplingParams


def draw(logits_BV: Tensor, uniforms_B: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits_BV: unscaled logits.
        uniforms_B: float64 in [0, 1), one per row (ignored when greedy).
        params: temperature, top-p or greedy.

    Returns:
        `[B]` token ids and `[B]` log-probs under the distribution that was sampled from: temperature applied, and
        renormalised over the nucleus. Greedy takes the most likely token and reports its log-prob at temperature 1.
    """
    logits_BV = logits_BV.float()
    if params.greedy:
        tokens_B = logits_BV.argmax(-1)
        return tokens_B, _pick(logits_BV, tokens_B) - torch.logsumexp(logits_BV, -1)
    if params.temperature != 1.0:
        logits_BV = logits_BV / params.temperature
    probability_BV = torch.softmax(logits_BV, -1)
    if params.top_p < 1.0:
        probability_BV = probability_BV * nucleus(probability_BV, params.top_p)
    cumulative_BV = probability_BV.cumsum(-1)
    total_B = cumulative_BV[:, -1]
    # u < 1, but u * total may round up to total, and then no token would exceed it
    aim_B = torch.minimum(uniforms_B.to(total_B) * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    tokens_B = torch.searchsorted(cumulative_BV, aim_B[:, None], right=True).squeeze(1)
    # logits that are NaN leave no token to find; the log-prob is then NaN, and the engine says so
    tokens_B = tokens_B.clamp_(max=logits_BV.shape[1] - 1)
    return tokens_B, torch.log(_pick(probability_BV, tokens_B) / probability_BV.sum(-1))


def nucleus(probability_BV: Tensor, top_p: float) -> Tensor:
    """Boolean `[B, V]`: the smallest set of most likely tokens whose mass reaches `top_p`.

    A token belongs to it if the tokens ranked before it hold less than `top_p`; so the set is never empty.
    """
    ranked_BV, order_BV = torch.sort(probability_BV, dim=-1, descending=True, stable=True)
    before_BV = ranked_BV.cumsum(-1) - ranked_BV
    return torch.zeros_like(probability_BV, dtype=torch.bool).scatter_(1, order_BV, before_BV < top_p)


def _pick(values_BV: Tensor, tokens_B: Tensor) -> Tensor:
    return values_BV.gather(1, tokens_B[:, None]).squeeze(1)
