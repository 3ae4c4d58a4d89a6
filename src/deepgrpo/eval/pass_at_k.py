"""Estimators of pass@k and maj@k from sampled answers. Pure arithmetic, no torch.

Worked example. A prompt has n = 4 samples, c = 1 of them correct. Of the 6 ways to pick k = 2 samples, 3
hold the correct one: pass@2 = 1 - C(3,2)/C(4,2) = 1 - 3/6 = 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is correct), from n samples with c correct ones.

    `pass@k = 1 - C(n-c, k) / C(n, k) = 1 - prod_{i=n-c+1..n} (1 - k/i)`; Chen et al. 2021 (arXiv:2107.03374),
    section 2.1. The product keeps every factor in [0, 1], so no binomial grows large.

    Args:
        n: number of samples, at least 1.
        c: number of correct samples, 0..n.
        k: number of tries, 1..n.

    Returns:
        a probability: exactly 1 if fewer than k samples are wrong, `c/n` for k = 1.

    Raises:
        ValueError: c or k is out of range.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, but n = {n}, c = {c}, k = {k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def maj_at_k(answers: Sequence[str | None], k: int) -> int | None:
    """Index of the first answer equal to the majority of the first k, or None without any answer.

    Ties go to the earliest answer. None (no answer) never wins. The caller scores the completion at that index:
    `maj_at_k(["7", "9", None, "9"], 4)` is 1.

    Args:
        answers: one per sample, in the order of sampling, already normalised.
        k: number of votes, 1..len(answers).

    Returns:
        an index below k, or None if none of the k has an answer.

    Raises:
        ValueError: k is out of range.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@k needs 1 <= k <= {len(answers)} answers, but k = {k}")
    votes: dict[str, int] = {}
    first: dict[str, int] = {}
    for index, answer in enumerate(answers[:k]):
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
            first.setdefault(answer, index)
    if not votes:
        return None
    # dicts keep the order of insertion and max returns the first maximum: the earliest answer wins a tie
    return first[max(votes, key=lambda answer: votes[answer])]
