"""Signal of a step's gradient, estimated from one gradient per prompt; with a bootstrap over prompts.

    x_i   gradient of prompt i under a strategy, scaled so that a step is the mean of its prompts'
    y_j   gradient of prompt j under rollouts from the prompt (GRPO): its mean is the true gradient, up to length

    along  = mean of <x_i, y_j> over i ≠ j         E = <E x, E y>
    truth  = mean of <y_i, y_j> over i ≠ j         E = |E y|²
    mean²  = mean of <x_i, x_j> over i ≠ j         E = |E x|²
    power  = mean |x_i|² / B + (1 - 1/B) · mean²   E = E |g|², g the gradient of a step of B prompts
    cos    = along / sqrt(truth · power)
    snr    = cos / sqrt(1 - cos²)                  snr² per 1,000 sampled tokens: · 1000 / (B · tokens per prompt)

No prompt meets itself, so the noise that x_i and y_i share counts nowhere. Averaging <r₁, r₂> over all ways to cut the
reference into two halves gives `truth` exactly, because every ordered pair i ≠ j is equally often in opposite halves.

Shapes: N prompts of the strategies, M ≥ N of the reference (the first N are the same), S streams, K numbers of a projected
gradient, R replicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo import rng
from deepgrpo.stats import cluster_weights

REPLICATES = 2000
SHRINK = 0.5
"""Weights of a replicate lie this far from 1 towards the multiplicities that were drawn; see `spread`."""
HIGHEST = 0.995
"""Largest |cos| that is reported: a reference that is mostly noise would give more, and snr² without bound."""


@dataclass(frozen=True)
class PromptGradients:
    """Gradients of one strategy, prompt by prompt, before the denominators of a step.

    The gradient of a step of prompts P is Σ_s Σ_{i in P} numerator_SNK[s, i] / Σ_{i in P} denominator_SN[s, i].
    """

    numerator_SNK: np.ndarray
    """Sum over a prompt's terms of a stream, lambda included."""
    denominator_SN: np.ndarray
    """Terms or sequences of a prompt in a stream: what the reduction divides by."""
    tokens_N: np.ndarray
    """Sampled tokens."""
    merged: bool = False
    """Both streams share one denominator (loss.streams = "merged")."""

    def stream(self, number: int) -> PromptGradients:
        """One stream alone."""
        one = slice(number, number + 1)
        return PromptGradients(self.numerator_SNK[one], self.denominator_SN[one], self.tokens_N)

    def step(self) -> np.ndarray:
        """`[K]` gradient of a step of all prompts."""
        scale_S = self._scales(np.ones((1, len(self.tokens_N))))[0] / len(self.tokens_N)
        gradient: np.ndarray = np.einsum("s,snk->k", scale_S, self.numerator_SNK.astype(np.float64))
        return gradient

    def _scales(self, weight_RN: np.ndarray) -> np.ndarray:
        """`[R, S]` factors from numerators to x_i: prompts per denominator."""
        below_RS = weight_RN @ self.denominator_SN.T
        if self.merged:
            below_RS = np.repeat(below_RS.sum(axis=1, keepdims=True), below_RS.shape[1], axis=1)
        count_R1 = weight_RN.sum(axis=1, keepdims=True)
        scales: np.ndarray = np.divide(count_R1, below_RS, out=np.zeros_like(below_RS), where=below_RS > 0)
        return scales


class Reference:
    """Inner products of the reference's gradients with each other.

    Args:
        gradient_MK: of rollouts from the prompt.
    """

    def __init__(self, gradient_MK: np.ndarray) -> None:
        self.gradient_MK = gradient_MK.astype(np.float64)
        self.kernel_MM = self.gradient_MK @ self.gradient_MK.T
        np.fill_diagonal(self.kernel_MM, 0.0)

    def truth(self, weight_RM: np.ndarray) -> np.ndarray:
        """`[R]` |E y|²."""
        return _mean_of_pairs(self.kernel_MM, weight_RM, weight_RM)

    def agreement(self) -> float:
        """Expected cosine of two halves of the reference: truth / E|r|² with r the mean of half of the prompts."""
        count = len(self.kernel_MM)
        truth = float(self.truth(np.ones((1, count)))[0])
        size = float((self.gradient_MK**2).sum(axis=1).mean())
        whole = truth + 2 * (size - truth) / count
        return float(np.clip(truth / whole, -1.0, 1.0)) if whole > 0 else 0.0


@dataclass(frozen=True)
class Replicates:
    """Figures of one strategy in each replicate, `[R]` each."""

    cos_R: np.ndarray
    root_R: np.ndarray
    """Root of snr² per 1,000 sampled tokens; negative for a gradient against the true one."""
    power_R: np.ndarray
    tokens_R: np.ndarray
    """Sampled tokens per prompt."""


def figures(one: PromptGradients, reference: Reference, weight_RM: np.ndarray, step_prompts: float) -> Replicates:
    """Figures of a strategy, for each row of prompt weights.

    Args:
        weight_RM: multiplicity of each prompt of the reference; its first N columns are the strategy's prompts.
        step_prompts: B, prompts of a training step.
    """
    count = len(one.tokens_N)
    weight_RN = weight_RM[:, :count]
    scale_RS = one._scales(weight_RN)
    flat_SNK = one.numerator_SNK.astype(np.float64)
    along_R = np.zeros(len(weight_RM))
    square_R, own_R = np.zeros_like(along_R), np.zeros_like(along_R)
    for s, first_NK in enumerate(flat_SNK):
        kernel_NM = first_NK @ reference.gradient_MK.T
        np.fill_diagonal(kernel_NM, 0.0)
        along_R += scale_RS[:, s] * _mean_of_pairs(kernel_NM, weight_RN, weight_RM)
        for t, second_NK in enumerate(flat_SNK):
            kernel_NN = first_NK @ second_NK.T
            own_N = kernel_NN.diagonal().copy()
            np.fill_diagonal(kernel_NN, 0.0)
            both_R = scale_RS[:, s] * scale_RS[:, t]
            square_R += both_R * _mean_of_pairs(kernel_NN, weight_RN, weight_RN)
            own_R += both_R * (weight_RN @ own_N) / weight_RN.sum(axis=1)
    truth_R = reference.truth(weight_RM)
    tokens_R = weight_RN @ one.tokens_N / weight_RN.sum(axis=1)
    return _ratios(along_R, truth_R, square_R, own_R, tokens_R, step_prompts)


def _ratios(
    along_R: np.ndarray, truth_R: np.ndarray, square_R: np.ndarray, own_R: np.ndarray, tokens_R: np.ndarray,
    step_prompts: float,
) -> Replicates:  # fmt: skip
    # a truth at or below 0 cannot be told from 0: cos is then as large as it may be
    truth_R = np.maximum(truth_R, 1e-300)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        # |E x|² is at least its part along the true gradient
        square_R = np.maximum(square_R, np.minimum(along_R**2 / truth_R, own_R))
        power_R = own_R / step_prompts + (1 - 1 / step_prompts) * square_R
        cos_R = np.where(power_R > 0, along_R / np.sqrt(truth_R) / np.sqrt(np.maximum(power_R, 1e-300)), 0.0)
    cos_R = np.clip(cos_R, -HIGHEST, HIGHEST)
    root_R = cos_R / np.sqrt(1 - cos_R**2) * np.sqrt(1000 / (step_prompts * np.maximum(tokens_R, 1e-9)))
    return Replicates(cos_R, root_R, power_R, tokens_R)


def _mean_of_pairs(kernel: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`[R]` weighted mean of a kernel `[A, B]` whose diagonal is zero and does not count."""
    shared = min(kernel.shape)
    pairs = left.sum(axis=1) * right.sum(axis=1) - (left[:, :shared] * right[:, :shared]).sum(axis=1)
    total: np.ndarray = ((left @ kernel) * right).sum(axis=1) / pairs
    return total


def prompt_weights(
    shared: Sequence[str], further: Sequence[str], seed: int, replicates: int = REPLICATES
) -> np.ndarray:  # fmt: skip
    """`[1 + R, M]` weights of prompts: all 1 for the figures themselves, then those of the replicates.

    The strategies' prompts and the further ones of the reference are drawn with replacement, apart from each other. All
    strategies get the same weights, so differences are paired.

    Args:
        shared, further: ids of the prompts; those of one id are drawn together.
    """
    random = rng.generator(seed, "probe bootstrap")
    drawn = [cluster_weights(ids, replicates, random) for ids in (shared, further) if ids]
    weights = 1 + SHRINK * (np.concatenate(drawn, axis=1) - 1.0)
    return np.concatenate([np.ones((1, weights.shape[1])), weights])


def spread(value_R: np.ndarray) -> np.ndarray:
    """The deviations of replicates from the figure itself, which is the first, taken back to full size.

    A mean over pairs has a term in the product of two weights. Multiplicities have variance 1 around 1, so a plain bootstrap
    counts the variance of pairs three times: once as a product, twice in the sums over one prompt's pairs. With weights nearer
    to 1 the product is of higher order, and the count is 2 + SHRINK². A remainder errs on the wide side.
    """
    spread_R: np.ndarray = value_R[0] + (value_R - value_R[0]) / SHRINK
    return spread_R
