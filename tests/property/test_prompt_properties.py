"""What is always true of the synthetic task and of cursors."""

from __future__ import annotations

from functools import cache

import pytest
from hypotheses import examples
from hypothesis import assume, given
from hypothesis import strategies as st

from chains import first_error, solution, verify
from deepgrpo.config import SyntheticData
from deepgrpo.prompts import synthetic
from deepgrpo.prompts.source import Cursor, PromptSource, build_source
from deepgrpo.prompts.synthetic import ALPHABET

moduli = st.integers(2, 10)


@st.composite
def problems(draw: st.DrawFn) -> tuple[str, int]:
    modulus = draw(moduli)
    chain = draw(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 9)), min_size=1, max_size=8))
    start = draw(st.integers(0, modulus - 1))
    return f"{start}" + "".join(f"{sign}{operand}" for sign, operand in chain) + ":", modulus


@given(problems())
def test_a_solution_verifies_and_agrees_with_python(problem):
    question, modulus = problem
    text = solution(question, modulus)
    assert verify(question, text, modulus).value == 1.0
    assert first_error(question, text, modulus) is None
    # brackets from the left make Python evaluate in our order
    chain = question.rstrip(":")
    expression = (
        "(" * (len(chain) // 2) + chain[0] + "".join(c + d + ")" for c, d in zip(chain[1::2], chain[2::2], strict=True))
    )
    assert text.rpartition("#")[2] == str(eval(expression) % modulus)
    # every step is true by itself, and its values are residues
    for step in text.split(";")[:-1]:
        left, right = step.split("=")
        assert eval(left) % modulus == int(right)
        assert max(int(left[0]), int(right)) < modulus


@given(problems(), st.text(alphabet=ALPHABET, max_size=60))
def test_no_error_exactly_for_prefixes_of_the_solution(problem, completion):
    question, modulus = problem
    assert (first_error(question, completion, modulus) is None) == solution(question, modulus).startswith(completion)


@given(problems(), st.data())
def test_one_changed_character_marks_its_segment(problem, data):
    question, modulus = problem
    text = solution(question, modulus)
    place = data.draw(st.integers(0, len(text) - 1))
    wrong = data.draw(st.sampled_from(ALPHABET))
    assume(wrong != text[place])
    changed = text[:place] + wrong + text[place + 1 :]
    start = text.rfind(";", 0, place) + 1  # the segment that the character belongs to
    assert first_error(question, changed, modulus) == start
    assert first_error(question, text[:place], modulus) is None


@given(st.integers(0, 10**6), st.integers(0, 5), st.integers(1, 6))
@examples(50)
def test_made_questions_belong_to_their_split(index, seed, chain_length):
    for split in ("train", "test"):
        row = synthetic.make(index, SyntheticData(split=split, seed=seed, chain_length=chain_length))
        assert synthetic.is_test(row.question) == (split == "test")


@cache
def source(size: int | None, shuffle: bool) -> PromptSource:
    data = SyntheticData(chain_length=3, size=size)
    return build_source(data, synthetic.tokenizer(), seed=7, context=64, shuffle=shuffle)


@pytest.mark.parametrize("size", [1, 7, None])
@pytest.mark.parametrize("shuffle", [True, False])
@given(epoch=st.integers(0, 3), position=st.integers(0, 6), n=st.integers(0, 15), m=st.integers(0, 15))
@examples(25)
def test_reading_twice_is_reading_once(size, shuffle, epoch, position, n, m):
    start = Cursor(epoch, position if size is None else position % size)
    first, middle = source(size, shuffle).take(start, n)
    second, end = source(size, shuffle).take(Cursor.from_dict(middle.to_dict()), m)
    assert source(size, shuffle).take(start, n + m) == (first + second, end)
    assert len(first) == n


@given(st.integers(0, 50))
@examples(20)
def test_every_epoch_reads_every_prompt_once(epoch):
    prompts, cursor = source(7, True).take(Cursor(epoch), 7)
    assert len({prompt.id for prompt in prompts}) == 7
    assert cursor == Cursor(epoch + 1)
