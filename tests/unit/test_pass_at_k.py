"""pass@k against its definition, the vote by hand, the intervals against published figures."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgrpo.eval.pass_at_k import maj_at_k, pass_at_k
from deepgrpo.rewards.vote import loose_answer, normalise
from deepgrpo.stats import standard_error, wilson_interval


def by_enumeration(n: int, c: int, k: int) -> Fraction:
    """The share of the k-subsets of n samples (the first c correct) that hold a correct one."""
    subsets = list(itertools.combinations(range(n), k))
    return Fraction(sum(any(i < c for i in subset) for subset in subsets), len(subsets))


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int) -> None:
    for c in range(n + 1):
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(float(by_enumeration(n, c, k)), abs=1e-12)


def test_pass_at_k_of_the_worked_example() -> None:
    # n = 4, c = 1, k = 2: 3 of the 6 pairs hold the correct sample
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    # k = 1 is the plain success rate
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)


@pytest.mark.parametrize(("c", "k"), [(0, 1), (0, 200), (200, 1), (1, 200)])
def test_pass_at_k_ends_are_exact(c: int, k: int) -> None:
    assert pass_at_k(200, c, k) == (0.0 if c == 0 else 1.0)


@given(st.integers(1, 400), st.data())
def test_pass_at_k_stays_exact_for_many_samples(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-11)
    if k < n:
        assert pass_at_k(n, c, k + 1) >= pass_at_k(n, c, k) - 1e-12


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_the_impossible(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"n = {n}, c = {c}, k = {k}"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("answers", "k", "winner"),
    [
        (["7", "9", None, "9"], 4, 1),
        (["7", "9", None, "9"], 3, 0),  # one vote each: the first wins
        (["9", "7", "7", "9"], 4, 0),
        ([None, None, "5"], 3, 2),  # two missing answers do not outvote one
        ([None, None, "5"], 2, None),
    ],
)
def test_majority(answers: list[str | None], k: int, winner: int | None) -> None:
    assert maj_at_k(answers, k) == winner


def test_majority_refuses_more_votes_than_answers() -> None:
    with pytest.raises(ValueError, match="k = 3"):
        maj_at_k(["1", "1"], 3)


def test_standard_error_by_hand() -> None:
    # mean 1/2, squared deviations 4 * 1/4 = 1, over n (n-1) = 12
    assert standard_error([0, 1, 0, 1]) == pytest.approx(math.sqrt(1 / 12))
    assert standard_error([0.3]) == 0.0


def test_wilson_interval() -> None:
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{1}, in the end \boxed{\frac{1}{2}}.", "0.5"),
        ("7 + 5 = 12\n#### 12", "12"),
        ("#### 1,200 ", "1200"),
        ("\\boxed{5} or\n#### 7", "7"),  # the last mark
        ("#### 7 or\n\\boxed{5}", "5"),
        ("#72", "72"),
        ("# Solution\nIt costs 5 dollars\n#### 5.", "5"),
        ("# Solution\nThe answer is 6\n## Step 2", "6"),
        ("# Solution\nIt is 6\n## Step 2", "2"),  # headings are no answers; the last number is
        ("The answer is 42.", "42"),
        ("It is 1,234.50 in all", "1234.5"),
        ("-3 or rather -4", "-4"),
        (r"\boxed{11}, no: \boxed{12", "11"),  # the last box that closes
        (r"cut off in \boxed{12", "12"),  # the box never closes; the last number stands in
        ("no idea", None),
        ("", None),
    ],
)
def test_loose_answer(text: str, answer: str | None) -> None:
    assert loose_answer(text) == answer


def test_normalise_keeps_tuples_apart() -> None:
    assert normalise("(1, 2)") == "(1,2)"
    assert normalise(" $12$. ") == normalise("$12.$") == "12"
