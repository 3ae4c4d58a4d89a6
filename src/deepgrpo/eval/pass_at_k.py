"""What a handful of sampled answers says: pass@k, maj@k and how sure we are. Pure arithmetic, no torch.

Worked example. A prompt has n = 4 samples, c = 1 of them correct. Of the 6 ways to pick k = 2 samples, 3
hold the correct one: pass@2 = 1 - C(3,2)/C(4,2) = 1 - 3/6 = 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k samples is correct, from n samples of which c are; unbiased.

    `pass@k = 1 - C(n-c, k) / C(n, k) = 1 - prod_{i=n-c+1..n} (1 - k/i)`; Chen et al. 2021 (arXiv:2107.03374),
    section 2.1. The product keeps every factor in [0, 1], so no binomial grows large.

    Args:
        n: samples drawn, at least 1.
        c: correct ones among them, 0..n.
        k: samples one may choose from, 1..n.

    Returns:
        a probability; exactly 1 when fewer than k samples are wrong, `c/n` for k = 1.

    Raises:
        ValueError: c or k is out of range.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, but n = {n}, c = {c}, k = {k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def maj_at_k(answers: Sequence[str | None], k: int) -> int | None:
    """Majority vote over the first k answers; returns the index of the first answer equal to the winner.

    Ties go to the answer that came first. None (no answer) never wins. The caller scores the completion at that
    index: `maj_at_k(["7", "9", None, "9"], 4)` is 1.

    Args:
        answers: one per sample, in the order of sampling, already normalised.
        k: how many of them vote, 1..len(answers).

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


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of one value per prompt: `sqrt(sum (v - mean)^2 / (n (n-1)))`.

    The unit is the prompt: with several samples per prompt pass the prompts' means, as samples of one prompt are not
    independent. It says how the figure would vary over other prompts of the same kind, not over seeds of the training.

    Returns 0 for a single value. Raises ValueError for none.
    """
    n = len(values)
    if n == 0:
        raise ValueError("the standard error of no values is not defined")
    if n == 1:
        return 0.0
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n * (n - 1)))


def wilson_interval(successes: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a success rate; unlike mean ± z·se it stays inside [0, 1] and works at 0 and n.

    `(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)` with p = successes / n; Wilson 1927.

    Args:
        successes: number of successes, 0..n.
        n: number of trials, at least 1.
        z: normal quantile; the default covers 95%.

    Raises:
        ValueError: n < 1, or successes out of range.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a success rate needs n >= 1 and 0 <= successes <= n, but successes = {successes}, n = {n}")
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
