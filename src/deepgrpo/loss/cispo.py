"""CISPO: clips the importance weight instead of the objective. Shapes: N terms."""

from __future__ import annotations

import torch
from torch import Tensor

from deepgrpo.loss.inputs import LossInputs, LossOutput, LossSettings


def clipped_weight_loss(
    logprob_N: Tensor, log_ratio_N: Tensor, advantage_N: Tensor, *, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """CISPO, MiniMax-M1 (arXiv:2506.13585): REINFORCE with a clipped importance weight.

    `ℓ = -sg[clip(ρ, low, high)] · A · log π`, sg the stop-gradient. A clipped token keeps its gradient, with the weight of
    the bound; the surrogate of PPO takes it away.

    Args:
        logprob_N: of the current policy, differentiable.
        log_ratio_N: log ρ of current and old policy.
        advantage_N: one per token.
        low, high: bounds of ρ itself; low = 0 is no lower bound, as in the paper.

    Returns:
        `[N]` losses, and `[N]` booleans: a bound acted on a token with an advantage.

    Example: ρ = 8, bounds 0 and 5, A = 2, log π = -0.5: ℓ = -5 · 2 · -0.5 = 5, and dℓ/dlog π = -10.
    """
    ratio_N = torch.exp(log_ratio_N.detach())
    loss_N = -ratio_N.clamp(low, high) * advantage_N * logprob_N
    return loss_N, ((ratio_N < low) | (ratio_N > high)) & (advantage_N != 0)


def cispo(inputs: LossInputs, config: LossSettings) -> LossOutput:
    """`loss.policy = "cispo"`."""
    loss_N, clipped_N = clipped_weight_loss(
        inputs.logprob_N, inputs.log_ratio(config.ratio), inputs.advantage_N, low=config.cispo_low, high=config.cispo_high
    )
    return LossOutput(loss_N, clipped_N)
