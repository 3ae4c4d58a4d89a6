"""Intervals of clustered counts, and intervals that hold together, against worked and published numbers."""

from __future__ import annotations

import numpy as np
import pytest

from deepgrpo import rng
from deepgrpo.stats import cluster_weights, clustered_proportion, simultaneous_intervals, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_clusters_of_one_trial_have_wilsons_interval(successes: int, trials: int, low: float, high: float) -> None:
    """The four examples of Newcombe 1998 (Statistics in Medicine 17, table I, method 3: the score interval)."""
    share = clustered_proportion([1] * successes + [0] * (trials - successes), [1] * trials)
    assert share.rate == pytest.approx(successes / trials)
    assert (share.low, share.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))
    assert (share.trials, share.clusters) == (trials, trials)


def test_two_clusters_by_hand() -> None:
    """2 of 2 and 0 of 2: p = 1/2, v = 2 · (1 + 1)/16 = 1/4, v0 = (1/4)/3 = 1/12, deff = 3: worth 4/3, so 1 trial.

    Wilson at n = 1: (1/2 + 1.9207 ± 1.96 · sqrt(1/4 + .9604)) / 4.8415 = (2.4207 ± 2.1563) / 4.8415.
    """
    share = clustered_proportion([2, 0], [2, 2])
    assert (share.low, share.high) == (pytest.approx(0.0546, abs=1e-4), pytest.approx(0.9454, abs=1e-4))


def test_unanimous_clusters_are_worth_little_more_than_a_trial_each() -> None:
    """Five of ten clusters all succeed: v = 10/9 · 40/1600, v0 = (1/4)/39, deff 4.33: 40 trials are worth 9."""
    share = clustered_proportion([4] * 5 + [0] * 5, [4] * 10)
    assert (share.low, share.high) == pytest.approx(wilson_interval(4.5, 9))


def test_where_all_succeed_a_cluster_is_a_trial() -> None:
    """3 of 3 clusters: low = 3 / (3 + 1.96²) = .4385."""
    share = clustered_proportion([4, 4, 4], [4, 4, 4])
    assert (share.low, share.high) == (pytest.approx(0.4385, abs=1e-4), 1.0)
    assert clustered_proportion([0, 0, 0], [4, 4, 4]).high == pytest.approx(1 - 0.4385, abs=1e-4)


def test_more_alike_never_makes_the_interval_narrower_than_independence() -> None:
    share = clustered_proportion([2] * 20, [4] * 20)  # clusters that are more alike than chance
    assert (share.low, share.high) == pytest.approx(wilson_interval(40, 80))


@pytest.mark.parametrize(("successes", "trials"), [([], []), ([2], [1]), ([0], [0]), ([-1], [1]), ([1, 1], [1])])
def test_impossible_counts(successes: list[int], trials: list[int]) -> None:
    with pytest.raises(ValueError, match="a proportion needs"):
        clustered_proportion(successes, trials)


def test_whole_clusters_are_drawn() -> None:
    weights = cluster_weights(["a", "b", "a", "c"], 500, rng.generator(0))
    assert weights.shape == (500, 4) and (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert weights[:, 0].mean() == pytest.approx(1, abs=0.15)


def test_how_wide_simultaneous_intervals_are() -> None:
    """One normal figure: 1.96 standard errors. Five independent ones: Φ⁻¹((1 + .95^(1/5))/2) = 2.57."""
    normal = rng.generator(1).normal(size=(40_000, 5)) * [1, 2, 3, 4, 5]
    low, high = simultaneous_intervals(np.zeros(1), normal[:, :1])
    assert (low[0], high[0]) == (pytest.approx(-1.96, abs=0.04), pytest.approx(1.96, abs=0.04))
    low, high = simultaneous_intervals(np.zeros(5), normal)
    # a quantile this far out has a standard error of .024 with 40,000 draws
    assert high / [1, 2, 3, 4, 5] == pytest.approx(2.57, abs=0.1)
    assert low / [1, 2, 3, 4, 5] == pytest.approx(-2.57, abs=0.1)


def test_a_figure_that_never_varies_has_no_width() -> None:
    drawn = np.stack([np.full(100, 0.5), rng.generator(2).normal(size=100)], axis=1)
    low, high = simultaneous_intervals(np.array([0.5, 0.0]), drawn)
    assert low[0] == high[0] == 0.5 and low[1] < 0 < high[1]
