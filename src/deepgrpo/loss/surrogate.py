"""Clipped policy-gradient surrogate. Shapes: N terms."""

from __future__ import annotations

import torch
from torch import Tensor

from deepgrpo.loss.inputs import LossInputs, LossOutput, LossSettings


def surrogate(
    log_ratio_N: Tensor, advantage_N: Tensor,
    *, clip_low: float, clip_high: float, dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Clipped surrogate loss per token, PPO (arXiv:1707.06347) with a dual clip (arXiv:1912.09729).

    `ℓ = -min(ρ A, clip(ρ, 1 - low, 1 + high) A)`; for A < 0 also `ℓ ≤ -c A`, c = dual_clip.

    Args:
        log_ratio_N: log ρ of current and old policy (loss/ratio.py), differentiable.
        advantage_N: one per token.

    Returns:
        `[N]` losses, and `[N]` booleans: the token was clipped and has no gradient.

    Example: bounds 0.8 and 1.3, dual clip 3. ρ = 1.5, A = 2: ℓ = -1.3 · 2 = -2.6. ρ = 5, A = -2: ℓ = 3 · 2 = 6. Both clipped.
    """
    ratio_N = torch.exp(log_ratio_N)
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = torch.maximum(-ratio_N * advantage_N, -clipped_N * advantage_N)
    if dual_clip is not None:
        loss_N = torch.where(advantage_N < 0, torch.minimum(loss_N, -dual_clip * advantage_N), loss_N)
    with torch.no_grad():
        outside_N = ((ratio_N < 1 - clip_low) & (advantage_N < 0)) | ((ratio_N > 1 + clip_high) & (advantage_N > 0))
        if dual_clip is not None:
            outside_N |= (ratio_N > dual_clip) & (advantage_N < 0)
    return loss_N, outside_N


def ppo(inputs: LossInputs, config: LossSettings) -> LossOutput:
    """`loss.policy = "ppo"`."""
    clip_low, clip_high = config.clip_range
    loss_N, clipped_N = surrogate(
        inputs.log_ratio(config.ratio), inputs.advantage_N, clip_low=clip_low, clip_high=clip_high,
        dual_clip=config.dual_clip,
    )  # fmt: skip
    return LossOutput(loss_N, clipped_N)
