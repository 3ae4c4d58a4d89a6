"""The interval of paired differences: against scipy's signed-rank test, and against numbers worked by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import coverage
from deepgrpo.stats import paired_interval, sign_test

whole_numbers = st.integers(-50, 50)


def test_worked_examples() -> None:
    # up to 6 seeds it is the range: P(W+ <= 0) = 1/64 is below 2.5%, P(W+ <= 1) = 2/64 is not, so k = 1
    three = paired_interval([-1.0, 0.0, 4.0])
    assert (three.mean, three.low, three.high, three.n) == (1.0, -1.0, 4.0, 3)
    assert (three.above, three.below, three.sign_p) == (1, 1, 1.0)
    six = paired_interval([5.0, 1.0, 2.0, 3.0, 4.0, 9.0])
    assert (six.mean, six.low, six.high, six.sign_p) == (4.0, 1.0, 9.0, 2 / 64)
    # 8 seeds: 5 of 256 subsets of the ranks 1..8 have a sum of at most 3 ({}, 1, 2, 3, 12), 2.0%, and 7 at most 4: k = 4.
    # the averages of 1, 2, 4, 8, ..., 128 from below: 1, 1.5, 2, 2.5; from above: 128, 96, 80, 72
    eight = paired_interval([2.0**i for i in range(8)])
    assert (eight.low, eight.high) == (2.5, 72.0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=6, max_size=12, unique=True))
def test_what_lies_outside_is_what_the_test_of_scipy_rejects(values: list[float]) -> None:
    from scipy import stats as scipy_stats

    found = paired_interval(values)
    i, j = np.triu_indices(len(values))
    walsh = np.unique(np.array([(values[a] + values[b]) / 2 for a, b in zip(i, j, strict=True)]))
    # strictly between two averages nothing is tied, and the test decides alike in the whole gap
    gaps = [(a + b) / 2 for a, b in itertools.pairwise(walsh) if b - a > 1e-9]
    for shift in gaps[:3] + gaps[-3:]:
        rejected = scipy_stats.wilcoxon(np.array(values) - shift, method="exact").pvalue <= 0.05
        assert rejected == (not found.low < shift < found.high)


@given(st.lists(whole_numbers, min_size=2, max_size=9), whole_numbers)
def test_what_is_always_true(values: list[int], shift: int) -> None:
    found = paired_interval(values)
    assert min(values) <= found.low <= found.high <= max(values) and min(values) <= found.mean <= max(values)
    mirrored = paired_interval([-v for v in values])
    assert (mirrored.low, mirrored.high) == (-found.high, -found.low)
    moved = paired_interval([v + shift for v in values])
    assert (moved.low, moved.high) == (found.low + shift, found.high + shift)
    assert paired_interval(values[::-1]) == found
    wider = paired_interval(values, 0.99)
    assert wider.low <= found.low and found.high <= wider.high


def test_coverage_by_simulation() -> None:
    """Student's t and ours at 8 normal differences, 95% and 96.1%; the percentile bootstrap falls short by 7 points."""
    value_SN = coverage.LAWS["normal"](np.random.default_rng(0), (3000, 8))
    shares = {}
    for name in ("Student's t", "Wilcoxon inverted", "percentile bootstrap"):
        low, high = coverage.METHODS[name](value_SN[:1000] if "boot" in name else value_SN, np.random.default_rng(1))
        shares[name] = float(((low <= 0) & (high >= 0)).mean())
    assert shares["Student's t"] == pytest.approx(0.95, abs=0.012)
    assert shares["Wilcoxon inverted"] == pytest.approx(0.961, abs=0.012)
    assert shares["percentile bootstrap"] < 0.92
    # what the benchmark measures is what compare uses
    low, high = coverage.METHODS["Wilcoxon inverted"](value_SN[:20], np.random.default_rng(1))
    ours = [paired_interval(list(row)) for row in value_SN[:20]]
    assert [each.low for each in ours] == pytest.approx(list(low)) and [each.high for each in ours] == pytest.approx(list(high))


def test_every_law_of_the_benchmark_has_mean_0() -> None:
    for law, draw in coverage.LAWS.items():
        values = draw(np.random.default_rng(0), (1000, 200))
        assert abs(values.mean()) < 5 * values.std() / 1000 * 5**0.5, law


def test_bootstrap_t_follows_the_skew() -> None:
    """The long side of the interval is that of the sample, 0 to 6 and 20 with mean 5.125; mirrored it is the other one."""
    values = np.array([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 20.0]])
    low, high = coverage.bootstrap_t(values, np.random.default_rng(0))
    assert high[0] - 5.125 > 1.5 * (5.125 - low[0]) > 0
    mirrored = coverage.bootstrap_t(-values, np.random.default_rng(0))
    assert (mirrored[0][0], mirrored[1][0]) == pytest.approx((-high[0], -low[0]))


def test_sign_test() -> None:
    assert sign_test(5, 0) == 0.0625  # 2 / 32
    assert sign_test(4, 1) == 0.375  # 2 · (1 + 5) / 32
    assert sign_test(3, 3) == 1.0 and sign_test(0, 0) == 1.0
    assert sign_test(0, 10) == 2 / 1024
    assert paired_interval([0.0, 0.0, 1.0]).sign_p == 1.0  # ties are left out: one seed


@pytest.mark.parametrize(
    ("values", "level", "says"),
    [([], 0.95, "at least 2 of them, not 0"), ([1.0], 0.95, "not 1"), ([1.0, float("nan")], 0.95, "finite"),
     ([1.0, 2.0], 1.0, "level is 1.0")],
)  # fmt: skip
def test_what_is_refused(values: list[float], level: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        paired_interval(values, level)
