"""The paired bootstrap, against all resamples written out and against numbers worked by hand; and what curves say."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st

from deepgrpo.lab.compare.curves import TailMean, area, first_crossing, tail_mean
from deepgrpo.stats import EXACT_UP_TO, bootstrap_interval, sign_test

whole_numbers = st.integers(-50, 50)


def written_out(values: list[int], level: Fraction) -> tuple[Fraction, Fraction]:
    """Every ordered draw of n from n, and the two bounds by counting."""
    means = sorted(Fraction(sum(draw), len(values)) for draw in itertools.product(values, repeat=len(values)))
    cut = (1 - level) / 2 * len(means)
    low = next(m for m in means if sum(other <= m for other in means) > cut)
    high = next(m for m in reversed(means) if sum(other >= m for other in means) > cut)
    return low, high


@given(st.lists(whole_numbers, min_size=3, max_size=3), st.sampled_from([(0.95, Fraction(95, 100)), (0.5, Fraction(1, 2))]))
def test_three_seeds_against_all_27_resamples(values: list[int], level: tuple[float, Fraction]) -> None:
    found = bootstrap_interval(values, level[0])
    assert (found.low, found.high) == pytest.approx(tuple(map(float, written_out(values, level[1]))), abs=1e-12)


@examples(20)
@given(st.lists(whole_numbers, min_size=4, max_size=4))
def test_four_seeds_against_all_256_resamples(values: list[int]) -> None:
    found = bootstrap_interval(values)
    assert (found.low, found.high) == pytest.approx(tuple(map(float, written_out(values, Fraction(95, 100)))), abs=1e-12)


def test_worked_examples() -> None:
    # 1 of 27 resamples has the lowest mean: 3.7% are more than 2.5%, nothing is cut off
    three = bootstrap_interval([-1.0, 0.0, 4.0])
    assert (three.mean, three.low, three.high, three.n) == (1.0, -1.0, 4.0, 3)
    assert (three.above, three.below, three.sign_p) == (1, 1, 1.0)
    # 256 resamples of 0, 1, 2, 3; cut off are at most 6.4. Sum 0: 1, sum 1: 4 (5 so far), sum 2: 6 + 4 (15): low = 2 / 4
    four = bootstrap_interval([0.0, 1.0, 2.0, 3.0])
    assert (four.low, four.high) == (0.5, 2.5)
    # two seeds: the lowest mean is in 1 of 4 resamples
    assert bootstrap_interval([0.25, 0.75]).low == 0.25


@given(st.lists(whole_numbers, min_size=2, max_size=6), whole_numbers)
def test_what_is_always_true(values: list[int], shift: int) -> None:
    found = bootstrap_interval(values)
    assert min(values) <= found.low <= found.mean + 1e-9 and found.mean - 1e-9 <= found.high <= max(values)
    mirrored = bootstrap_interval([-v for v in values])
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-12)
    moved = bootstrap_interval([v + shift for v in values])
    assert (moved.low, moved.high) == pytest.approx((found.low + shift, found.high + shift), abs=1e-9)
    assert bootstrap_interval(values[::-1]) == found


def test_many_seeds_are_drawn_always_the_same() -> None:
    values = [float(i) for i in range(EXACT_UP_TO + 3)]  # 0..11: mean 5.5, variance 143 / 12
    found = bootstrap_interval(values)
    assert found == bootstrap_interval(values)
    # the mean of 12 draws is nearly normal with variance 143 / 12 / 12: 5.5 ± 1.96 · .9965
    assert (found.low, found.high) == pytest.approx((3.55, 7.45), abs=0.1)


def test_sign_test() -> None:
    assert sign_test(5, 0) == 0.0625  # 2 / 32
    assert sign_test(4, 1) == 0.375  # 2 · (1 + 5) / 32
    assert sign_test(3, 3) == 1.0 and sign_test(0, 0) == 1.0
    assert sign_test(0, 10) == 2 / 1024
    assert bootstrap_interval([0.0, 0.0, 1.0]).sign_p == 1.0  # ties are left out: one seed


@pytest.mark.parametrize(
    ("values", "level", "says"),
    [([], 0.95, "at least 2 of them, not 0"), ([1.0], 0.95, "not 1"), ([1.0, float("nan")], 0.95, "finite"),
     ([1.0, 2.0], 1.0, "level is 1.0")],
)  # fmt: skip
def test_what_is_refused(values: list[float], level: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        bootstrap_interval(values, level)


# ---------------------------------------------------------------- curves

CURVE = [(0.0, 0.2), (100.0, 0.4), (300.0, 0.8)]


def test_area_by_hand() -> None:
    # (100 · (.2 + .4) / 2 + 200 · (.4 + .8) / 2) / 300 = (30 + 120) / 300
    assert area(CURVE, 300) == pytest.approx(0.5)
    # at 200 the curve is at .6: (30 + 100 · .5) / 200
    assert area(CURVE, 200) == pytest.approx(0.4)
    assert area(CURVE, 50) == pytest.approx(0.25)
    # two evaluations at the same count: a jump has no area
    assert area([(0, 0.0), (10, 0.0), (10, 1.0), (20, 1.0)], 20) == pytest.approx(0.5)


def test_no_area_beyond_the_ends() -> None:
    assert area(CURVE, 301) is None
    assert area(CURVE[1:], 200) is None
    assert area([], 1) is None and area(CURVE, 0) is None


@given(st.lists(st.tuples(st.integers(0, 100), st.floats(0, 1)), min_size=1, max_size=8), st.floats(1e-3, 100))
def test_an_area_is_a_mean(points: list[tuple[int, float]], end: float) -> None:
    curve = [(0, points[0][1]), *sorted(points), (100, points[-1][1])]
    found = area(curve, end)
    values = [y for _, y in curve]
    assert found is not None and min(values) - 1e-9 <= found <= max(values) + 1e-9


def test_tokens_to_an_accuracy_by_hand() -> None:
    assert first_crossing(CURVE, 0.6) == pytest.approx(200)  # half way from .4 to .8
    assert first_crossing(CURVE, 0.8) == 300 and first_crossing(CURVE, 0.2) == 0
    assert first_crossing(CURVE, 0.81) is None
    # the first crossing counts, whatever comes after
    assert first_crossing([(0, 0.0), (10, 0.5), (20, 0.1), (30, 0.9)], 0.25) == pytest.approx(5)


def test_the_last_evaluations() -> None:
    assert tail_mean(CURVE, last=1, share=None, end=300) == TailMean(0.8, 1)
    # the state before training is no result of it
    assert tail_mean(CURVE, last=10, share=None, end=300) == TailMean(pytest.approx(0.6), 2)
    assert tail_mean(CURVE[:1], last=10, share=None, end=300) is None
    # in the last fifth of 300 lie those from 240 on
    assert tail_mean(CURVE, last=None, share=0.2, end=300) == TailMean(0.8, 1)
    assert tail_mean(CURVE, last=None, share=0.7, end=300) == TailMean(pytest.approx(0.6), 2)
    assert tail_mean(CURVE[:2], last=None, share=0.2, end=300) is None
