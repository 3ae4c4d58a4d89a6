"""AdamW and its learning rate."""

from __future__ import annotations

import math

import torch

from deepgrpo.config import OptimConfig
from deepgrpo.model.policy import Policy


def build_optimizer(policy: Policy, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all trainable parameters, in the model's order.

    Fused: separate operations would read and write the weights about ten times.
    """
    return torch.optim.AdamW(
        policy.trainable().values(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
        fused=True,
    )  # fmt: skip


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """Learning rate of an optimizer step.

    Rises linearly over `warmup_steps`, from lr / warmup_steps at step 0; then stays constant, or falls to zero at `total`
    linearly or along a cosine.

    Args:
        step: number of optimizer steps before this one, those of run steps without signal included: the schedule ends with
            the run, however many optimizer steps it takes.
        total: number of optimizer steps of the whole run, if every run step takes its own.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    left = 1.0 - min(1.0, done)
    return config.lr * (left if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * (1.0 - left))))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
