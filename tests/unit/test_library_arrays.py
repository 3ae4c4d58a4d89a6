"""The pure functions on lists, numpy arrays and torch tensors: numbers by hand, and the trainer's own results."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from trees import make_tree

from deepgrpo import (
    Recoverability,
    dual_stream_loss,
    fit_recoverability,
    group_advantages,
    pack_trees,
    select_pivots,
    sibling_credit,
    tree_mask,
)

# ---------------------------------------------------------------- advantages


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_advantages_in_the_kind_that_came(kind: Any) -> None:
    rewards = [[0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    found = group_advantages(kind(rewards))
    assert isinstance(found, torch.Tensor if kind is torch.tensor else np.ndarray)
    assert found.tolist() == [[-0.5, 0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]
    # 0 1 1: mean 2/3; the sample deviation is sqrt(1/3)
    assert group_advantages(kind([0.0, 1.0, 1.0]), scale="std").tolist() == pytest.approx(
        [each / (math.sqrt(1 / 3) + 1e-4) for each in (-2 / 3, 1 / 3, 1 / 3)]
    )


def test_advantages_keep_dtype() -> None:
    assert group_advantages(torch.tensor([0, 1])).dtype == torch.float32
    assert group_advantages(torch.tensor([0.0, 1.0], dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(ValueError, match="baseline needs at least 2"):
        group_advantages([[1.0], [0.0]])
    with pytest.raises(ValueError, match="single number"):
        group_advantages(1.0)


# ---------------------------------------------------------------- pivots


def test_q_by_hand() -> None:
    """States 0 10 20 30 40, r = .2 .4 .6 .8 1; without an estimate Q ∝ r², so 4 16 36 64 of 120."""
    draw = select_pivots([10, 20, 30, 40], num_pivots=4, random=0)
    assert draw.candidates.tolist() == [0, 10, 20, 30] and draw.q.tolist() == pytest.approx([1 / 30, 4 / 30, 9 / 30, 16 / 30])
    assert sorted(draw.offsets.tolist()) == [0, 10, 20, 30]  # without replacement
    assert draw.ratios.tolist() == pytest.approx([(offset / 10 + 1) / 5 for offset in draw.offsets])
    shallow = select_pivots(np.array([10, 20, 30, 40]), root_pivot=False, max_ratio=0.6, room=20, gamma=0.0)
    assert shallow.candidates.tolist() == [10] and shallow.q.tolist() == [1.0]
    # P(.2) : P(.8) with w = -1, b = 0, gamma 0
    estimate = Recoverability(w=-1.0, fitted=True)
    q = select_pivots([10, 20, 30, 40], gamma=0.0, recoverability=estimate).q
    assert q[0] / q[3] == pytest.approx((1 + math.exp(0.8)) / (1 + math.exp(0.2)))


def test_pivots_in_torch() -> None:
    draw = select_pivots(torch.tensor([2, 5]), random=3)
    assert draw.offsets.dtype == draw.candidates.dtype == torch.int64
    assert draw.q.dtype == draw.ratios.dtype == torch.float32
    assert draw.offsets.tolist() == select_pivots([2, 5], random=np.random.default_rng(3)).offsets.tolist()
    assert len(select_pivots([1], root_pivot=False).offsets) == 0


@pytest.mark.parametrize("ends", [[], [0, 3], [3, 3], [5, 2]])
def test_ends_that_do_not_ascend(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="give ascending ends of segments from 1 on"):
        select_pivots(ends)


def test_the_fit_is_the_trainer_s() -> None:
    ratios, outcomes = [0.2, 0.4, 0.6, 0.8] * 4, [1, 1, 1, 0] * 4
    found = fit_recoverability(torch.tensor(ratios, dtype=torch.float64), np.array(outcomes))
    assert found.fitted and found.w < 0 and found == fit_recoverability(ratios, outcomes)
    assert not fit_recoverability(ratios, outcomes, min_items=16).fitted  # more than that many
    bins = fit_recoverability(ratios, outcomes, model="bins", bins=5)
    assert bins.probability([0.2, 0.8]).tolist() == pytest.approx([5 / 6, 1 / 6])  # (4 + 1) / (4 + 2) and (0 + 1) / (4 + 2)
    with pytest.raises(ValueError, match=r"ratios has the shape \[2\] and outcomes \[1\]"):
        fit_recoverability([0.1, 0.2], [1])


# ---------------------------------------------------------------- loss


def test_loss_by_hand() -> None:
    """Two rows of three tokens. Main: two trained tokens, ratio 1 and e^.5, A = 1: -(1 + 1.2) / 2, the second one clipped.
    Branch: one trained token, ratio 1, A = -.5: .5, times lambda 2. Both streams: -1.1 + 1 = -.1.
    """
    logprobs = torch.tensor([[9.0, -1.0, -1.0], [9.0, 9.0, -2.0]], requires_grad=True)
    old = torch.tensor([[0.0, -1.0, -1.5], [0.0, 0.0, -2.0]])
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]])
    rows = {"branch": [False, True], "mask": mask, "old_logprobs": old, "lambda_": 2.0}
    loss = dual_stream_loss(logprobs, [1.0, -0.5], **rows)
    assert loss.item() == pytest.approx(-0.1)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[0.0, -0.5, 0.0], [0.0, 0.0, 1.0]]
    # the same terms in a row, in numpy
    flat = dual_stream_loss(
        [-1.0, -1.0, -2.0], [1.0, 1.0, -0.5], branch=[0, 0, 1], old_logprobs=np.array([-1.0, -1.5, -2.0]), lambda_=2.0
    )
    assert isinstance(flat, np.float64) and flat == pytest.approx(-0.1)
    # k3 of log π_ref - log π = log 2: 2 - log 2 - 1, once per stream
    kl = dual_stream_loss(
        [-1.0, -2.0], [0.0, 0.0], branch=[0, 1], reference_logprobs=[-1.0 + math.log(2), -2.0], beta=0.1
    )
    assert kl == pytest.approx(0.1 * (1 - math.log(2)))


def test_reductions() -> None:
    """Main rows of 1 and 3 tokens with A = 1 and 2. token: -(1 + 6) / 4. sequence: -(1 + 2) / 2. constant, 10: -7 / 20."""
    mask = np.array([[1, 0, 0], [1, 1, 1]])
    for reduction, wanted in (("token", -1.75), ("sequence", -1.5), ("constant", -0.35)):
        found = dual_stream_loss(
            np.zeros((2, 3)), [1.0, 2.0], branch=[0, 0], mask=mask, reduction=reduction, reduction_length=10  # type: ignore[arg-type]
        )
        assert found == pytest.approx(wanted)
        terms = dual_stream_loss(
            np.zeros(4), [1.0, 2.0, 2.0, 2.0], branch=[0] * 4, sequence=[7, 3, 3, 3], reduction=reduction, reduction_length=10  # type: ignore[arg-type]
        )
        assert terms == pytest.approx(wanted)
    with pytest.raises(ValueError, match="give sequence, the label of each term"):
        dual_stream_loss([0.0], [1.0], branch=[0], reduction="sequence")
    with pytest.raises(ValueError, match="reference_logprobs is missing"):
        dual_stream_loss([0.0], [1.0], branch=[0], beta=0.1)
    with pytest.raises(ValueError, match=r"advantages has the shape \[3\]; give \[2, 2\] or \[2\]"):
        dual_stream_loss(np.zeros((2, 2)), [1.0, 1.0, 1.0], branch=[0, 0])


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [2, 0, 3, 1, 4]])
def test_the_order_of_rows_does_not_matter(order: list[int]) -> None:
    draws = np.random.default_rng(1)
    logprobs, old, advantages = draws.normal(size=(5, 4)), draws.normal(size=(5, 4)), draws.normal(size=5)
    mask, branch = draws.random((5, 4)) < 0.7, np.array([0, 0, 1, 1, 1])
    whole = dual_stream_loss(logprobs, advantages, branch=branch, mask=mask, old_logprobs=old)
    mixed = dual_stream_loss(
        logprobs[order], advantages[order], branch=branch[order], mask=mask[order], old_logprobs=old[order]
    )
    assert mixed == pytest.approx(whole, abs=1e-12)


# ---------------------------------------------------------------- packs


def test_packs_and_rows_give_the_log_probs_of_separate_paths(policy: Any) -> None:
    """A plain model of transformers with `tree_mask` reads a pack as it reads each path alone."""
    trees = [make_tree([(6, 0.0), (5, 1.0)], [(0, 4, [(2, 1.0), (3, 0.0)])]), make_tree([(3, 1.0), (4, 0.0)])]
    credits = [sibling_credit(tree) for tree in trees]
    wanted: list[float] = []
    with torch.no_grad():
        for tree in trees:
            for number, node in enumerate(tree.nodes):
                path = torch.tensor([tree.path(number)])
                log_p = policy.model(path).logits[0, :-1].log_softmax(-1).gather(1, path[0, 1:, None])[:, 0]
                wanted += log_p[-len(node.tokens) :].tolist()
        for share, size in ((True, 64), (True, 16), (False, 40)):
            packed = pack_trees(trees, credits, tokens_per_pack=size, share_prefixes=share)
            found = np.zeros(len(packed.terms))
            for pack in packed.packs:
                how: dict[str, Any] = {}
                if share:
                    mask = torch.from_numpy(tree_mask(pack))[None, None]
                    how = {"attention_mask": mask, "position_ids": torch.from_numpy(pack.positions_BT)}
                logits = policy.model(torch.from_numpy(pack.input_ids_BT), **how).logits.flatten(0, 1)
                log_p = logits[torch.from_numpy(pack.rows_n)].log_softmax(-1)
                targets = torch.from_numpy(packed.terms.target_N[pack.terms_n])
                found[pack.terms_n] = log_p.gather(1, targets[:, None])[:, 0].numpy()
            assert found.tolist() == pytest.approx(wanted, abs=1e-5), (share, size)
    one, *_ = pack_trees(trees, credits, tokens_per_pack=64).packs
    assert one.num_tokens == sum(len(t.prompt.tokens) + sum(len(n.tokens) for n in t.nodes) for t in trees)
    with pytest.raises(ValueError, match="rows of paths and no trees"):
        tree_mask(pack_trees(trees, credits, share_prefixes=False).packs[0])
