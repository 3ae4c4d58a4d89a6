"""Supervised training on written solutions, so that there is something to reinforce.

A group in which every rollout fails teaches nothing; a model from scratch fails always. A few hundred steps of imitation
bring it to where some rollouts succeed and some do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepgrpo.config import WarmstartConfig
from deepgrpo.model.policy import Policy
from deepgrpo.pack.budget import pack_rows
from deepgrpo.pack.layout import Row

Example = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt tokens, and the tokens of its written solution with EOS."""


@dataclass(frozen=True, slots=True)
class Imitated:
    """What became of a warm start. Example: Imitated(steps=400, accuracy=0.41, stopped=False)."""

    steps: int
    accuracy: float | None
    """The last one that was measured."""
    stopped: bool
    """It was asked to end before it had reached its target or its last step."""


def warm_start(
    policy: Policy, config: WarmstartConfig, examples: Callable[[int, int], Sequence[Example]], *, tokens_per_pack: int,
    check: Callable[[], float] | None = None, progress: Callable[[int, float, float | None], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Imitated:  # fmt: skip
    """Imitate solutions with cross-entropy on their tokens; the prompt is not trained.

    Args:
        examples: (start, count) → that many examples; the same for the same arguments.
        check: measures the sampled accuracy, called every `check_every` steps if there is a target.
        progress: told (step, loss, accuracy or None) after each step.
        stop: asked before each step whether to end here.
    """
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=config.lr, weight_decay=0.01)
    warmup = max(1, config.steps // 10)
    accuracy: float | None = None
    policy.model.train()
    for step in range(config.steps):
        if stop():
            return Imitated(step, accuracy, stopped=True)
        done = max(0, step - warmup) / max(1, config.steps - warmup)
        lr = config.lr * min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = _step(policy, examples(step * config.batch_size, config.batch_size), tokens_per_pack)
        torch.nn.utils.clip_grad_norm_(policy.trainable().values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        measured: float | None = None
        if check is not None and config.target_accuracy is not None and (step + 1) % config.check_every == 0:
            measured = accuracy = check()
            policy.model.train()
        if progress is not None:
            progress(step + 1, loss, measured)
        if measured is not None and config.target_accuracy is not None and measured >= config.target_accuracy:
            return Imitated(step + 1, accuracy, stopped=False)
    return Imitated(config.steps, accuracy, stopped=False)


def _step(policy: Policy, batch: Sequence[Example], tokens_per_pack: int) -> float:
    """Accumulate the gradient of the mean loss per solution token; returns that loss in nats."""
    rows: list[Row] = []
    total = 0
    for prompt, solution in batch:
        count = len(solution)
        positions = np.arange(len(prompt) - 1, len(prompt) + count - 1)
        rows.append(Row(np.array(prompt + solution, dtype=np.int64), positions, np.arange(total, total + count)))
        total += count
    targets = torch.from_numpy(np.concatenate([np.array(solution, dtype=np.int64) for _, solution in batch]))
    loss_sum = 0.0
    for pack in pack_rows(rows, tokens_per_pack):
        logprob_n, _ = policy.logprobs(
            torch.from_numpy(pack.input_ids_BT).to(policy.device),
            torch.from_numpy(pack.rows_n).to(policy.device),
            targets[torch.from_numpy(pack.terms_n)].to(policy.device),
            temperature=1.0,
        )
        loss = -logprob_n.sum() / total
        loss.backward()
        loss_sum += float(loss.detach())
    return loss_sum
