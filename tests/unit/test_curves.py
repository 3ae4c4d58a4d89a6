"""Learning curves: heights, areas, and where a target is reached, by hand; and luck by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgrpo.lab.compare.curves import area, common_windows, first_reached, mean_height, thinned, value_at

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


def test_the_height_of_a_part_by_hand() -> None:
    # from 50 (.3) to 200 (.6), with the bend of .4 at 100: (50 · .35 + 100 · .5) / 150
    assert mean_height(CURVE, 50, 200) == pytest.approx(0.45)
    assert mean_height(CURVE, 100, 300) == pytest.approx(0.6) and mean_height(CURVE, 200, 301) is None
    assert mean_height(CURVE[1:], 50, 200) is None and mean_height(CURVE, 100, 100) is None


def test_the_height_at_a_mark_by_hand() -> None:
    assert [value_at(CURVE, x) for x in (0, 50, 100, 150, 300)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.8])
    # never beyond the last evaluation, nor before the first
    assert value_at(CURVE, 301) is None and value_at(CURVE[1:], 99) is None and value_at([], 0) is None
    # an evaluation after a step without an update has the same number of optimizer steps
    assert value_at([(0, 0.1), (1, 0.2), (1, 0.3), (2, 0.5)], 1) == 0.3


@given(st.lists(st.tuples(st.integers(0, 100), st.floats(0, 1)), min_size=1, max_size=8), st.floats(0, 100))
def test_a_height_is_between_its_neighbours(points: list[tuple[int, float]], x: float) -> None:
    curve = [(0, points[0][1]), *sorted(points), (100, points[-1][1])]
    found = value_at(curve, x)
    left, right = max(p for p, _ in curve if p <= x), min(p for p, _ in curve if p >= x)
    near = [y for p, y in curve if p in (left, right)]
    assert found is not None and min(near) - 1e-9 <= found <= max(near) + 1e-9


def test_a_target_is_reached_where_the_next_evaluation_confirms_it() -> None:
    assert first_reached([*CURVE, (400.0, 0.7)], 0.6) == pytest.approx(200)  # half way from .4 to .8
    assert first_reached(CURVE, 0.6) is None  # nothing follows the last evaluation
    lucky = [(0.0, 0.0), (10.0, 0.5), (20.0, 0.1), (30.0, 0.4), (40.0, 0.4)]
    assert first_reached(lucky, 0.25) == pytest.approx(20 + 10 * 0.5)  # 10 was luck; from .1 at 20 to .4 at 30
    assert first_reached([(0.0, 0.5), (9.0, 0.5)], 0.4) == 0 and first_reached(lucky, 0.45) is None


def test_one_evaluation_per_common_window() -> None:
    many = [(float(x), x / 100) for x in range(0, 101, 10)]
    few = [(0.0, 0.0), (30.0, 0.3), (55.0, 0.5), (80.0, 0.8), (110.0, 1.0)]
    # quarters: 0, 30, 55, 80 are one each; fifths: nothing in [60, 80) but at 55
    assert common_windows([many, few], 100) == 4 and common_windows([many], 100) == 10
    assert thinned(many, 4, 100) == [(0.0, 0.0), (30.0, 0.3), (50.0, 0.5), (80.0, 0.8), (100.0, 1.0)]
    assert thinned(few, 4, 100) == few
    # evaluations at the first step beyond each mark: as many windows as marks
    assert common_windows([[(0, 0.0), *((100 * k + 7, 0.0) for k in range(1, 11))]], 1000) == 10
    assert common_windows([[(0, 0.0)], many], 100) == 1


def test_more_evaluations_are_no_more_chances() -> None:
    """On a flat curve with noise, a run with 12 and one with 60 evaluations reach a target by luck equally often."""
    random = np.random.default_rng(0)
    runs, end, counts = 2000, 1200, {"few": 12, "many": 60}
    lucky, first = dict.fromkeys(counts, 0), dict.fromkeys(counts, 0)
    for _ in range(runs):
        curves = {
            name: [(end * i / count, float(y)) for i, y in enumerate(random.normal(0.5, 0.03, count + 1))]
            for name, count in counts.items()
        }
        windows = common_windows(list(curves.values()), end)
        assert windows == 12
        for name, curve in curves.items():
            lucky[name] += first_reached(thinned(curve, windows, end), 0.53) is not None
            first[name] += max(y for _, y in curve) >= 0.53
    # before: the first evaluation above the target was enough, and many of them had more
    assert first["many"] > 1.1 * first["few"]
    # the difference of two shares near .25 of 2,000 runs has a standard error of .014
    assert 0.1 < lucky["few"] / runs < 0.4 and abs(lucky["few"] - lucky["many"]) / runs < 0.04
