"""Two streams, one loss: selection of rows, and the final weight of each term.

    L = Σ_main ℓ / T_main + λ · Σ_branch ℓ / T_branch + β · (Σ_main KL / T_main + Σ_branch KL / T_branch)

Every T is a count over the whole optimizer step. Each term therefore carries its final weight, and any split into
micro-batches or ranks sums to the same loss. Shapes: N terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from deepgrpo.records import Credit

MAIN, BRANCH = 0, 1
ZERO_ADVANTAGE = 1e-8
"""Rows with a smaller absolute advantage carry no signal (the reference's threshold)."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Credit to train, and counts of the rows that were dropped."""

    credits: tuple[Credit, ...]
    dropped_zero: int
    """Dropped rows without advantage."""
    dropped_few: int
    """Dropped branch rows, where a step had too few of them."""


def select(credits: Sequence[Credit], *, drop_zero_advantage: bool, min_branch_sequences: int = 0) -> Selection:
    """Drop rows from the update, and with them from the KL term and the denominators (docs/details.md 5 and 6).

    First, rows whose advantage is zero; then all branch rows, if fewer than `min_branch_sequences` remain in the step.
    """
    before = sum(len(credit.spans) for credit in credits)
    if drop_zero_advantage:
        credits = [replace(c, spans=tuple(s for s in c.spans if abs(s.advantage) >= ZERO_ADVANTAGE)) for c in credits]
    after = sum(len(credit.spans) for credit in credits)
    branches = sum(s.stream == "branch" for credit in credits for s in credit.spans)
    few = branches if branches < min_branch_sequences else 0
    if few:
        credits = [replace(c, spans=tuple(s for s in c.spans if s.stream != "branch")) for c in credits]
    return Selection(tuple(credits), before - after, few)


@dataclass(frozen=True, slots=True)
class TermWeights:
    """Final weights of the terms; `L = Σ policy · ℓ + Σ kl · KL`."""

    policy_N: np.ndarray
    kl_N: np.ndarray


def term_weights(
    stream_N: np.ndarray, sequence_N: np.ndarray, *, lambda_: float, beta: float,
    reduction: Literal["token", "sequence", "constant"] = "token", reduction_length: int | None = None,
    streams: Literal["dual", "merged"] = "dual", lambda_scales_kl: bool = False, full_branch_sequences: int = 0,
) -> TermWeights:  # fmt: skip
    """Weights of the terms of one optimizer step.

    With T_s the terms and n_s the sequences of a stream, |i| the terms of sequence i, a term of the main stream weighs
    `1 / T_s` (token), `1 / (n_s |i|)` (sequence) or `1 / (n_s · reduction_length)` (constant). A branch term weighs λ times
    that. "merged" counts T and n over both streams together.

    Args:
        stream_N: 0 main, 1 branch.
        sequence_N: labels, equal for terms of the same sequence.
        reduction_length: in tokens; required by "constant".
        full_branch_sequences: with n branch sequences, fewer than this, λ is replaced by λ n / full_branch_sequences.

    Worked example, token, λ = 0.5: two main terms and four branch terms weigh 1/2 each and 1/8 each.
    """
    base_N = np.zeros(len(stream_N), dtype=np.float64)
    for members in [np.ones(len(stream_N), bool)] if streams == "merged" else [stream_N == MAIN, stream_N == BRANCH]:
        if not members.any():
            continue
        labels, inverse, lengths = np.unique(sequence_N[members], return_inverse=True, return_counts=True)
        if reduction == "token":
            base_N[members] = 1.0 / members.sum()
        elif reduction == "sequence":
            base_N[members] = 1.0 / (len(labels) * lengths[inverse])
        else:
            assert reduction_length is not None
            base_N[members] = 1.0 / (len(labels) * reduction_length)
    if full_branch_sequences:
        few = len(np.unique(sequence_N[stream_N == BRANCH]))
        lambda_ *= min(1.0, few / full_branch_sequences)
    lambda_N = np.where(stream_N == BRANCH, lambda_, 1.0)
    return TermWeights(base_N * lambda_N, base_N * beta * (lambda_N if lambda_scales_kl else 1.0))
