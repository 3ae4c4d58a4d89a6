"""Ratios of policies, per token or per sequence. Shapes: N terms; a sequence is the trained tokens of a node.

GSPO (arXiv:2507.18071) compares whole responses with the old policy, because rewards belong to whole responses:

    s_i = exp(1/|i| Σ_t d_t)        d_t = log π(token t) - log π_old(token t), t over the |i| trained tokens of sequence i

Here it has the form of its GSPO-token: the ratio of term t has the value s_i and the gradient of its own log-prob,

    ρ_t = sg[s_i] · π_t / sg[π_t]        so  ∇ρ_t = s_i ∇log π_t        while  ∇s_i = s_i · 1/|i| Σ_u ∇log π_u

With one advantage A and one weight w for all terms of a sequence (every reduction gives equal weights within one), the two
forms have the same loss and the same gradient, Σ_t w A ∇ρ_t = w A s_i Σ_t ∇log π_t = Σ_t w A ∇s_i, and both clip a sequence
as a whole. Where a strategy gives the tokens of a node different advantages, only this form is defined per token. The mean is
needed as a number only, so no gradient runs across terms.

With one optimizer step per batch every d_t is 0: s_i = ρ_t = 1 and ∇ρ_t = ∇log π_t at either level, so both give the same
update: A ∇log π_t per term, weighted by the reduction (`sequence`, as in the paper: A / (n |i|)).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def log_ratio(logprob_N: Tensor, old_logprob_N: Tensor, sequence_N: Tensor | None = None) -> Tensor:
    """Log of the ratio of current and old policy, which weighs a term and is clipped.

    Args:
        logprob_N: log-probs of the current policy, differentiable.
        old_logprob_N: log-probs of the policy at the start of the batch.
        sequence_N: int labels, equal for the terms of a sequence, all of which must be present; None: a ratio per token.

    Returns:
        `[N]`, in nats; differentiable, each entry by its own log-prob only.
    """
    difference_N = logprob_N - old_logprob_N
    if sequence_N is None:
        return difference_N
    return sequence_mean(difference_N.detach(), sequence_N) + (logprob_N - logprob_N.detach())


def importance_weight(
    learner_logprob_N: Tensor, sampler_logprob_N: Tensor, low: float, high: float,
    *, mode: Literal["truncate", "mask"] = "truncate", sequence_N: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Importance weight `w = π_learner / μ_sampler` per token, bounded, without gradient.

    Tokens are drawn from a slightly different distribution than the learner computes (another dtype, another engine, a
    nucleus). The weight corrects for that, and the bounds limit its variance (docs/details.md 9 and 46):

        truncate    min(max(w, low), high)                  TIS; low = 0 bounds from above only
        mask        w where low ≤ w ≤ high, else 0          IcePop (Ring-1T, arXiv:2510.18855)

    Args:
        low, high: bounds of the weight itself, included.
        sequence_N: int labels as in `log_ratio`; w is then the geometric mean over the sequence, one for all of its tokens.

    Example: w = 0.25, 0.5, 3 and 8 with bounds 0.5 and 5: truncated 0.5, 0.5, 3, 5; masked 0, 0.5, 3, 0.
    """
    difference_N = learner_logprob_N.detach() - sampler_logprob_N
    if sequence_N is not None:
        difference_N = sequence_mean(difference_N, sequence_N)
    weight_N = torch.exp(difference_N)
    if mode == "mask":
        return torch.where((weight_N >= low) & (weight_N <= high), weight_N, 0.0)
    return weight_N.clamp(low, high)


def sequence_mean(values_N: Tensor, sequence_N: Tensor) -> Tensor:
    """Mean of each sequence, repeated at its terms. Example: values 1 3 5 of the sequences 0 0 7 give 2 2 5."""
    if values_N.device.type == "mps":  # which has no float64
        return sequence_mean(values_N.cpu(), sequence_N.cpu()).to(values_N.device)
    _, inverse_N, lengths = torch.unique(sequence_N, return_inverse=True, return_counts=True)
    # float64: a GPU adds in no fixed order, and the rounding of that must not show
    sums = torch.zeros(len(lengths), dtype=torch.float64, device=values_N.device)
    sums.index_add_(0, inverse_N, values_N.double())
    means_N: Tensor = (sums / lengths)[inverse_N].to(values_N.dtype)
    return means_N
