"""Advantages, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from trees import make_tree

from deepgrpo.credit.group import NegativeRewardError, centre
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.credit.whiten import whiten
from deepgrpo.records import Credit, CreditSpan


def test_reward_minus_mean() -> None:
    # mean of 1, 0, 0, 1, 1 is 0.6
    assert centre([1, 0, 0, 1, 1]) == pytest.approx([0.4, -0.6, -0.6, 0.4, 0.4])


def test_std_is_the_sample_deviation_plus_1e_4() -> None:
    # mean 0.5, squared deviations 4 * 0.25 = 1, divided by N - 1 = 3: std = 0.57735
    assert centre([1, 0, 1, 0], "std") == pytest.approx(np.array([1, -1, 1, -1]) * 0.5 / (0.5773502691896258 + 1e-4))


def test_scaled_by_the_mean() -> None:
    """MaxRL: mean of 1, 0, 0, 0 is 1/4, so .75 / .25 = 3 and -.25 / .25 = -1; two of four: .5 / .5 and -.5 / .5.

    Rewards 3, 1, 2 have the mean 2: 1/2, -1/2, 0.
    """
    assert centre([1, 0, 0, 0], "mean").tolist() == [3, -1, -1, -1]
    assert centre([1, 0, 1, 0], "mean").tolist() == [1, -1, 1, -1]
    assert centre([3, 1, 2], "mean").tolist() == [0.5, -0.5, 0]


def test_a_mean_below_zero_is_refused_and_none_at_all_is_zero() -> None:
    """With the mean -0.5 the advantage of reward 0 would be -1 and that of reward -1 would be 1."""
    assert centre([0, 0, 0], "mean").tolist() == [0, 0, 0]
    for rewards in ([0, -1], [2, -1], [-1, -1]):  # also where the mean is positive, or the group agrees
        with pytest.raises(NegativeRewardError, match=r'credit.scale is "mean", but a group has the reward -1: .*"none"'):
            centre(rewards, "mean")


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=20))
@example([0.0, 5e-324])  # the mean of the smallest float and 0 rounds to 0
def test_scaled_by_the_mean_advantages_are_bounded(rewards: list[float]) -> None:
    """No reward is above N times the mean, so no constant has to be added to it."""
    advantages = centre(rewards, "mean")
    assert advantages.min() >= -1 and advantages.max() <= (len(rewards) - 1) * (1 + 1e-12)


@pytest.mark.parametrize("scale", ["none", "std", "mean"])
def test_agreement_is_exactly_zero_even_where_the_mean_rounds(scale: Any) -> None:
    # the floating-point mean of seven times 0.1 is not 0.1
    assert not centre([0.1] * 7, scale).any()


def test_one_sibling_has_no_baseline() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        centre([1.0])


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20))
def test_advantages_sum_to_zero(rewards: list[float]) -> None:
    assert abs(centre(rewards).sum()) < 1e-9


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=8), st.randoms())
def test_order_of_siblings_is_irrelevant(rewards: list[float], random: object) -> None:
    order = list(range(len(rewards)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert centre([rewards[i] for i in order]) == pytest.approx(centre(rewards)[order])


def test_each_node_is_compared_with_its_own_siblings(worked_tree) -> None:  # type: ignore[no-untyped-def]
    credit = sibling_credit(worked_tree)
    assert [(s.node, s.start, s.end, s.advantage, s.stream) for s in credit.spans] == [
        (0, 0, 6, -0.5, "main"),
        (1, 0, 5, 0.5, "main"),
        (2, 0, 2, 0.5, "branch"),
        (3, 0, 3, -0.5, "branch"),
    ]
    assert [(g.stream, g.rewards, g.mixed) for g in credit.groups] == [
        ("main", (0.0, 1.0), True),
        ("branch", (1.0, 0.0), True),
    ]


def test_three_levels_by_hand() -> None:
    """Each pivot is a group of its own, whatever the rewards above and below it.

    Main 0, 1, 0: mean 1/3. Behind the second token of node 0: 1, 0, 0, 0, mean 1/4 (nodes 3 to 6). Behind the first of node
    3: 1, 1, 0, mean 2/3 (nodes 7 to 9). Scaled, the same over the deviations sqrt(1/3), sqrt(1/4), sqrt(1/3), plus 1e-4.
    """
    tree = make_tree(
        [(6, 0.0), (4, 1.0), (5, 0.0)],
        [(0, 2, [(4, 1.0), (3, 0.0), (2, 0.0), (1, 0.0)]), (3, 1, [(2, 1.0), (2, 1.0), (1, 0.0)])],
    )
    credit = sibling_credit(tree)
    assert [s.node for s in credit.spans] == list(range(10))
    assert [(s.start, s.end) for s in credit.spans] == [(0, n) for n in (6, 4, 5, 4, 3, 2, 1, 2, 2, 1)]
    assert [s.stream for s in credit.spans] == ["main"] * 3 + ["branch"] * 7
    main, middle, deep = [-1 / 3, 2 / 3, -1 / 3], [3 / 4, -1 / 4, -1 / 4, -1 / 4], [1 / 3, 1 / 3, -2 / 3]
    assert [s.advantage for s in credit.spans] == pytest.approx([*main, *middle, *deep])
    scaled = [s.advantage for s in sibling_credit(tree, "std").spans]
    third, quarter = 0.5773503 + 1e-4, 0.5 + 1e-4
    assert scaled == pytest.approx(
        [*(a / third for a in main), *(a / quarter for a in middle), *(a / third for a in deep)], abs=1e-6
    )


def test_whitening_weighs_by_tokens_within_a_stream() -> None:
    tree = make_tree([(1, 0.0), (3, 1.0)])
    # advantages -.5 (1 token) and .5 (3 tokens): mean .25, variance (.75² + 3 * .25²) / 4 = .1875
    (credit,) = whiten([tree], [sibling_credit(tree)])
    std = 0.1875**0.5
    assert [s.advantage for s in credit.spans] == pytest.approx([-0.75 / std, 0.25 / std])


def test_whitening_bounds_a_nearly_flat_stream() -> None:
    """Advantages ±4e-8 with one token each: 4 / (4 + 1), as 1e-8 is added to their deviation."""
    spans = tuple(CreditSpan(i, 0, 1, a, "main") for i, a in enumerate([4e-8, -4e-8]))
    (credit,) = whiten([make_tree([(1, 0.0), (1, 1.0)])], [Credit(spans, ())])
    assert [s.advantage for s in credit.spans] == pytest.approx([0.8, -0.8])


def test_whitening_leaves_a_flat_stream_alone() -> None:
    tree = make_tree([(2, 1.0), (3, 1.0)])
    assert [s.advantage for s in whiten([tree], [sibling_credit(tree)])[0].spans] == [0.0, 0.0]
