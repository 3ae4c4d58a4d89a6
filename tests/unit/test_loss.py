"""Surrogate, KL and stream weights, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from trees import make_tree

from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.loss.kl import k3
from deepgrpo.loss.ratio import importance_weight, log_ratio
from deepgrpo.loss.streams import select, term_weights
from deepgrpo.loss.surrogate import surrogate
from deepgrpo.records import Credit, CreditSpan

MAIN2_BRANCH4 = np.array([0, 0, 1, 1, 1, 1])


def _surrogate(ratio: float, advantage: float, dual_clip: float | None = 3.0) -> tuple[float, bool, float]:
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss, clipped = surrogate(
        log_ratio(logprob, torch.zeros(1, dtype=torch.float64)), torch.tensor([advantage], dtype=torch.float64),
        clip_low=0.2, clip_high=0.3, dual_clip=dual_clip,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss.sum(), logprob)
    return loss.item(), bool(clipped), grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "grad"),
    [
        (1.0, 2.0, -2.0, False, -2.0),
        (1.5, 2.0, -2.6, True, 0.0),  # clipped at 1.3
        (0.5, 2.0, -1.0, False, -1.0),  # a fall of a good token is never clipped
        (0.5, -2.0, 1.6, True, 0.0),  # clipped at 0.8
        (1.5, -2.0, 3.0, False, 3.0),
        (5.0, -2.0, 6.0, True, 0.0),  # dual clip: 3 * 2
    ],
)
def test_surrogate(ratio: float, advantage: float, loss: float, clipped: bool, grad: float) -> None:
    assert _surrogate(ratio, advantage) == (pytest.approx(loss), clipped, pytest.approx(grad))


def test_without_dual_clip_a_bad_token_is_unbounded() -> None:
    assert _surrogate(5.0, -2.0, dual_clip=None) == (pytest.approx(10.0), False, pytest.approx(10.0))


def test_k3_by_hand() -> None:
    # d = log ref - log p = log 2: 2 - log 2 - 1
    logprob = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    reference = torch.tensor([-1.0 + math.log(2.0), -1.0], dtype=torch.float64)
    assert k3(logprob, reference).tolist() == pytest.approx([1 - math.log(2.0), 0.0])


def test_importance_weight_is_capped_and_detached() -> None:
    learner = torch.tensor([0.0, 0.0], requires_grad=True)
    weight = importance_weight(learner, torch.tensor([-math.log(1.5), -math.log(9.0)]), 0.0, 2.0)
    assert weight.tolist() == pytest.approx([1.5, 2.0])
    assert not weight.requires_grad


def test_token_reduction_divides_each_stream_by_its_own_tokens() -> None:
    weights = term_weights(MAIN2_BRANCH4, np.array([0, 0, 1, 1, 1, 2]), lambda_=0.5, beta=0.1)
    assert weights.policy_N.tolist() == [1 / 2, 1 / 2, 1 / 8, 1 / 8, 1 / 8, 1 / 8]
    # the KL of the branches is not scaled by lambda
    assert weights.kl_N.tolist() == pytest.approx([0.05, 0.05, 0.025, 0.025, 0.025, 0.025])


def test_lambda_scales_kl_is_a_switch() -> None:
    weights = term_weights(MAIN2_BRANCH4, MAIN2_BRANCH4, lambda_=0.5, beta=0.1, lambda_scales_kl=True)
    assert weights.kl_N.tolist() == pytest.approx([0.05, 0.05, *[0.0125] * 4])


def test_lambda_grows_with_the_number_of_branches() -> None:
    """Two branch sequences of five that lambda = .5 asks for: lambda .2, so each of the four branch terms weighs .2 / 4."""
    sequences = np.array([0, 0, 1, 1, 1, 2])
    scaled = term_weights(MAIN2_BRANCH4, sequences, lambda_=0.5, beta=0.1, full_branch_sequences=5)
    assert scaled.policy_N.tolist() == pytest.approx([1 / 2] * 2 + [0.05] * 4)
    assert scaled.kl_N.tolist() == pytest.approx([0.05] * 2 + [0.025] * 4)  # the KL is not lambda's
    whole = term_weights(MAIN2_BRANCH4, sequences, lambda_=0.5, beta=0.1, full_branch_sequences=2)
    assert whole.policy_N.tolist() == term_weights(MAIN2_BRANCH4, sequences, lambda_=0.5, beta=0.1).policy_N.tolist()
    none = term_weights(np.zeros(2, int), np.zeros(2, int), lambda_=0.5, beta=0.1, full_branch_sequences=5)
    assert none.policy_N.tolist() == [0.5, 0.5]


def test_sequence_reduction_is_a_mean_of_token_means() -> None:
    # branch sequences of 3 and 1 tokens: 1/2 * 1/3 and 1/2 * 1/1
    weights = term_weights(MAIN2_BRANCH4, np.array([0, 0, 1, 1, 1, 2]), lambda_=1, beta=0, reduction="sequence")
    assert weights.policy_N.tolist() == pytest.approx([1 / 2, 1 / 2, 1 / 6, 1 / 6, 1 / 6, 1 / 2])


def test_constant_reduction_divides_by_sequences_times_length() -> None:
    weights = term_weights(
        MAIN2_BRANCH4, np.array([0, 0, 1, 1, 1, 2]), lambda_=1, beta=0, reduction="constant", reduction_length=10
    )
    assert weights.policy_N.tolist() == pytest.approx([1 / 10, 1 / 10, *[1 / 20] * 4])


def test_merged_streams_share_one_denominator() -> None:
    weights = term_weights(MAIN2_BRANCH4, MAIN2_BRANCH4, lambda_=0.5, beta=0, streams="merged")
    assert weights.policy_N.tolist() == pytest.approx([1 / 6, 1 / 6, *[1 / 12] * 4])


def test_rows_without_advantage_leave() -> None:
    mixed, unanimous = make_tree([(2, 0.0), (2, 1.0)]), make_tree([(5, 1.0), (5, 1.0)])
    credits = [sibling_credit(mixed), sibling_credit(unanimous)]
    dropped = select(credits, drop_zero_advantage=True)
    assert [len(c.spans) for c in dropped.credits] == [2, 0]
    assert dropped.dropped_zero == 2
    kept = select(credits, drop_zero_advantage=False)
    assert [len(c.spans) for c in kept.credits] == [2, 2]


def test_rows_are_without_advantage_below_1e_8() -> None:
    """The reference's threshold: 1e-8 itself stays, of either sign."""
    spans = tuple(CreditSpan(i, 0, 1, a, "main") for i, a in enumerate([1e-8, -1e-8, 0.99e-8, -0.99e-8]))
    kept = select([Credit(spans, ())], drop_zero_advantage=True)
    assert [s.node for s in kept.credits[0].spans] == [0, 1] and kept.dropped_zero == 2


def test_minimum_of_branch_rows_counts_after_the_zero_rows_left() -> None:
    tree = make_tree([(4, 0.0), (4, 1.0)], [(0, 2, [(2, 1.0), (2, 0.0)]), (0, 1, [(2, 0.0), (2, 0.0)])])
    credits = [sibling_credit(tree)]
    kept = select(credits, drop_zero_advantage=True, min_branch_sequences=2)
    assert [s.stream for s in kept.credits[0].spans] == ["main", "main", "branch", "branch"]
    few = select(credits, drop_zero_advantage=True, min_branch_sequences=3)
    assert [s.stream for s in few.credits[0].spans] == ["main", "main"]
    assert few.dropped_few == 2
