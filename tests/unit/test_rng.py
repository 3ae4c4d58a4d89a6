"""Random streams: a draw depends on its address alone, and is uniform."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgrpo import rng

KEYS = st.integers(min_value=0, max_value=2**64 - 1)


def splitmix64(key: int, counter: int) -> float:
    """The published mixer in Python's own integers, as the reference for the numpy version."""
    mask = 2**64 - 1
    state = (key + (counter + 1) * 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return ((state ^ (state >> 31)) >> 11) * 2.0**-53


def test_known_values() -> None:
    # the first output of SplitMix64 with seed 0 is 0xE220A8397B1DCDAF; its upper 53 bits make the uniform
    assert rng.uniforms([0], [0])[0] == (0xE220A8397B1DCDAF >> 11) * 2.0**-53
    # the hash is part of every saved run: a change here would break all resumes
    assert rng.key(0, 1, "p") == rng.key(0, 1, "p") == 0xAA87123C1F5C5EC4


@given(keys=st.lists(KEYS, min_size=1, max_size=8), counter=st.integers(min_value=0, max_value=2**32))
def test_agrees_with_the_published_mixer(keys: list[int], counter: int) -> None:
    drawn = rng.uniforms(keys, [counter] * len(keys))
    assert drawn.tolist() == [splitmix64(key, counter) for key in keys]
    assert ((drawn >= 0) & (drawn < 1)).all()


@given(rows=st.lists(st.tuples(KEYS, st.integers(0, 10_000)), min_size=1, max_size=20), data=st.data())
def test_a_draw_does_not_depend_on_its_batch(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    keys, counters = zip(*rows, strict=True)
    together = rng.uniforms(keys, counters)
    order = data.draw(st.permutations(range(len(rows))))
    shuffled = rng.uniforms([keys[i] for i in order], [counters[i] for i in order])
    assert shuffled.tolist() == together[order].tolist()
    assert [rng.uniforms([k], [c])[0] for k, c in rows] == together.tolist()


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("along", ["counter", "key", "sequential key"])
def test_draws_are_uniform(along: str) -> None:
    size, bins = 100_000, 100
    if along == "counter":
        drawn = rng.uniforms([rng.key(7)] * size, range(size))
    elif along == "key":
        drawn = rng.uniforms([rng.key(7, node) for node in range(size)], [0] * size)
    else:
        drawn = rng.uniforms(range(size), [0] * size)
    # 99 degrees of freedom: mean 99, standard deviation 14.1; 99.9% of samples lie between 60 and 149
    assert 60 < chi_square(np.bincount((drawn * bins).astype(int), minlength=bins)) < 149


def test_neighbours_are_independent() -> None:
    size = 50_000
    first, second = rng.key(0, 0, "p", 0), rng.key(0, 0, "p", 1)
    of_one = rng.uniforms([first] * size, range(size))
    of_other = rng.uniforms([second] * size, range(size))
    # the correlation of independent draws has standard deviation 1 / sqrt(50000) = 0.0045
    assert abs(np.corrcoef(of_one, of_other)[0, 1]) < 0.02
    assert abs(np.corrcoef(of_one[:-1], of_one[1:])[0, 1]) < 0.02
    # pairs fill the square: 10 x 10 cells, same bounds as above
    cells = (of_one * 10).astype(int) * 10 + (of_other * 10).astype(int)
    assert 60 < chi_square(np.bincount(cells, minlength=100)) < 149


def test_parts_of_an_address_keep_their_type_and_their_place() -> None:
    keys = [rng.key(*a) for a in [(1,), ("1",), (1, 1), (11,), ("1", "1"), (1, "1"), ("1", 1), ("1,1",), ()]]
    assert len(set(keys)) == len(keys)
    assert rng.key(1, 2) != rng.key(2, 1)
    assert all(0 <= key < 2**64 for key in keys)


PARTS = st.lists(st.integers() | st.text(max_size=5), max_size=4)


@given(a=PARTS, b=PARTS)
def test_equal_addresses_have_equal_keys(a: list[int | str], b: list[int | str]) -> None:
    if a == b:
        assert rng.key(*a) == rng.key(*b)
    elif not any("\x1f" in part for part in [*a, *b] if isinstance(part, str)):
        assert rng.key(*a) != rng.key(*b)


def test_a_generator_belongs_to_its_address() -> None:
    assert rng.generator(3, "shuffle").permutation(20).tolist() == rng.generator(3, "shuffle").permutation(20).tolist()
    assert rng.generator(3, "shuffle").random() != rng.generator(4, "shuffle").random()
