"""Sequence ratios: by hand, against the paper's formula written out sequence by sequence, and what must not matter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepgrpo.loss.ratio import importance_weight, log_ratio, sequence_mean
from deepgrpo.loss.streams import term_weights
from deepgrpo.loss.surrogate import surrogate


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- by hand


def test_the_mean_of_each_sequence_stands_at_each_of_its_terms() -> None:
    # labels need be neither sorted nor contiguous: (1 + 3) / 2, (5 + 7 + 9) / 3
    means = sequence_mean(tensor(1, 5, 3, 7, 9), torch.tensor([4, -1, 4, -1, -1]))
    assert means.tolist() == [2, 7, 2, 7, 7]


def test_log_ratio_by_hand() -> None:
    """Log-prob differences .2 and -.4 of one sequence, .3 of another: -.1, -.1 and .3. Each gradient is its own."""
    logprob = tensor(-0.8, -1.4, -0.7).requires_grad_()
    old, sequence = tensor(-1.0, -1.0, -1.0), torch.tensor([0, 0, 1])
    ratio = log_ratio(logprob, old, sequence)
    assert ratio.tolist() == pytest.approx([-0.1, -0.1, 0.3])
    (gradient,) = torch.autograd.grad((ratio * tensor(1, 10, 100)).sum(), logprob)
    assert gradient.tolist() == [1, 10, 100]
    assert log_ratio(logprob, old).tolist() == pytest.approx([0.2, -0.4, 0.3])


def test_a_sequence_is_clipped_as_a_whole() -> None:
    """Ratios 1.5 and 1/1.5 cancel: each token alone is clipped (one above, with A > 0), the sequence is not.

    Ratios 1.21 and 1.21 · 1.21 have the geometric mean 1.21^1.5 = 1.331: both tokens are clipped at 1.3.
    """
    up = math.log(1.21)
    logprob, old = tensor(math.log(1.5), -math.log(1.5), up, 2 * up).requires_grad_(), tensor(0, 0, 0, 0)
    sequence, advantage = torch.tensor([0, 0, 1, 1]), tensor(1, 1, 1, 1)
    clip = {"clip_low": 0.3, "clip_high": 0.3}
    loss, clipped = surrogate(log_ratio(logprob, old, sequence), advantage, **clip)
    assert clipped.tolist() == [False, False, True, True]
    assert loss.tolist() == pytest.approx([-1, -1, -1.3, -1.3])
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    assert gradient.tolist() == pytest.approx([-1, -1, 0, 0])
    assert surrogate(log_ratio(logprob, old), advantage, **clip)[1].tolist() == [True, False, False, True]


def test_the_importance_weight_of_a_sequence() -> None:
    """log-prob differences log 1.5 and log 6 have the mean log 3, above the cap of 2; log 1.5 alone is below."""
    sampler = tensor(-math.log(1.5), -math.log(6), -math.log(1.5))
    learner = tensor(0, 0, 0).requires_grad_()
    weight = importance_weight(learner, sampler, 0.0, 4.0, sequence_N=torch.tensor([0, 0, 1]))
    assert weight.tolist() == pytest.approx([3, 3, 1.5]) and not weight.requires_grad
    capped = importance_weight(learner, sampler, 0.0, 2.0, sequence_N=torch.tensor([0, 0, 1]))
    assert capped.tolist() == pytest.approx([2, 2, 1.5])
    assert importance_weight(learner, sampler, 0.0, 4.0).tolist() == pytest.approx([1.5, 4, 1.5])


# ---------------------------------------------------------------- against the formula


@dataclass
class Batch:
    """Sequences of a step as the formula has them; terms are the sequences one after the other."""

    lengths: list[int]
    advantages: list[float]
    streams: list[int]
    logprob_N: Tensor
    old_N: Tensor

    @property
    def labels(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.lengths)), self.lengths)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    number = st.floats(-2, 2, allow_nan=False)
    streams = [draw(st.integers(0, 1)) for _ in lengths]
    advantages = [draw(number) for _ in lengths]
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    old = -random.exponential(1.0, sum(lengths))
    moved = old + random.normal(0, draw(st.sampled_from([0.0, 0.01, 0.5])), sum(lengths))
    return Batch(lengths, advantages, streams, torch.from_numpy(moved).requires_grad_(), torch.from_numpy(old))


CLIP: dict[str, Any] = {"clip_low": 0.05, "clip_high": 0.1, "dual_clip": 1.4}
LAMBDA = 0.7


def ours(batch: Batch, reduction: Any, order: np.ndarray | None = None, level: str = "sequence") -> tuple[float, Tensor]:
    """Loss and gradient by the functions that the learner calls, in float64."""
    order = np.arange(sum(batch.lengths)) if order is None else order
    sequence_N = batch.labels[order]
    stream_N, advantage_N = (np.repeat(x, batch.lengths)[order] for x in (batch.streams, batch.advantages))
    weights = term_weights(stream_N, sequence_N, lambda_=LAMBDA, beta=0, reduction=reduction, reduction_length=9)
    ratio_N = log_ratio(
        batch.logprob_N[order], batch.old_N[order], torch.from_numpy(sequence_N) if level == "sequence" else None
    )
    loss_N, _ = surrogate(ratio_N, torch.from_numpy(advantage_N), **CLIP)
    loss = (torch.from_numpy(weights.policy_N) * loss_N).sum()
    (gradient,) = torch.autograd.grad(loss, batch.logprob_N)
    return loss.item(), gradient


def written_out(batch: Batch, reduction: str) -> tuple[float, Tensor]:
    """The paper's: one ratio per sequence, differentiated through its mean; the reductions as sentences."""
    total = torch.zeros((), dtype=torch.float64)
    for stream, weight in ((0, 1.0), (1, LAMBDA)):
        members = [i for i, s in enumerate(batch.streams) if s == stream]
        tokens = sum(batch.lengths[i] for i in members)
        for i in members:
            start = sum(batch.lengths[:i])
            part = slice(start, start + batch.lengths[i])
            ratio = torch.exp((batch.logprob_N[part] - batch.old_N[part]).sum() / batch.lengths[i])
            a = batch.advantages[i]
            loss = -torch.minimum(ratio * a, ratio.clamp(1 - CLIP["clip_low"], 1 + CLIP["clip_high"]) * a)
            if a < 0:
                loss = torch.minimum(loss, tensor(-CLIP["dual_clip"] * a)[0])
            share = {
                "token": batch.lengths[i] / tokens, "sequence": 1 / len(members),
                "constant": batch.lengths[i] / (9 * len(members)),
            }[reduction]  # fmt: skip
            total = total + weight * share * loss
    (gradient,) = torch.autograd.grad(total, batch.logprob_N)
    return total.item(), gradient


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
@given(batch=batches())
def test_loss_and_gradient_are_those_of_the_paper(reduction: str, batch: Batch) -> None:
    loss, gradient = ours(batch, reduction)
    expected, expected_gradient = written_out(batch, reduction)
    assert loss == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


@given(batch=batches(), seed=st.integers(0, 2**32 - 1))
def test_the_order_of_the_terms_does_not_matter(batch: Batch, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(sum(batch.lengths))
    loss, gradient = ours(batch, "token", order)
    expected, expected_gradient = ours(batch, "token")
    assert loss == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
@given(batch=batches())
def test_on_policy_both_levels_are_the_same_update(reduction: str, batch: Batch) -> None:
    """Ratio 1: a term's gradient is its weight times its advantage; with `sequence`, A / (n |i|)."""
    batch.old_N = batch.logprob_N.detach().clone()
    loss, gradient = ours(batch, reduction)
    assert (loss, gradient.tolist()) == (ours(batch, reduction, level="token")[0], gradient.tolist())
    assert torch.equal(gradient, ours(batch, reduction, level="token")[1])
    if reduction == "sequence":
        counts = {s: batch.streams.count(s) for s in batch.streams}
        by_hand = [
            -a / (counts[s] * length) * (LAMBDA if s else 1.0)
            for a, s, length in zip(batch.advantages, batch.streams, batch.lengths, strict=True)
        ]
        assert gradient.tolist() == pytest.approx(np.repeat(by_hand, batch.lengths).tolist(), rel=1e-12)


@given(batch=batches())
def test_sequences_of_one_token_are_tokens(batch: Batch) -> None:
    batch.lengths = [1] * len(batch.lengths)
    batch.logprob_N = batch.logprob_N.detach()[: len(batch.lengths)].clone().requires_grad_()
    batch.old_N = batch.old_N[: len(batch.lengths)]
    whole, alone = ours(batch, "token"), ours(batch, "token", level="token")
    assert whole[0] == pytest.approx(alone[0], rel=1e-12) and torch.allclose(whole[1], alone[1], rtol=1e-12)


def test_each_token_keeps_its_own_advantage() -> None:
    """Where a strategy credits the tokens of a node differently: ratio 1.1 for all, gradients 1.1 times 1, 0 and -2."""
    logprob, old = tensor(0.3, 0.0, -0.3).requires_grad_(), tensor(0.3, 0.0, -0.3) - math.log(1.1)
    ratio = log_ratio(logprob, old, torch.tensor([0, 0, 0]))
    loss, _ = surrogate(ratio, tensor(1, 0, -2), clip_low=0.2, clip_high=0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    assert gradient.tolist() == pytest.approx([-1.1, 0, 2.2])
