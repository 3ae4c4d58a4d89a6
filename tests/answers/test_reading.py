"""Numbers and places of answers: values from data files, properties, and texts made to hang a reader."""

from __future__ import annotations

import json
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from hypotheses import examples
from hypothesis import example, given
from hypothesis import strategies as st

from deepgrpo.answers.boxed import find_box
from deepgrpo.answers.numbers import canonical, decimal_form, read_number, same_number
from deepgrpo.answers.places import find_answer
from deepgrpo.config import ColumnMap, JsonlData, MathReward, ParquetData, TemplateConfig
from deepgrpo.prompts.gym import extract_answer
from deepgrpo.prompts.tasks import read_rows
from deepgrpo.records import Prompt
from deepgrpo.rewards.form import read_form
from deepgrpo.rewards.math_answer import MathAnswerReward
from deepgrpo.rewards.math_check import check_answer
from deepgrpo.rewards.same import quick_verdict
from deepgrpo.rewards.vote import loose_answer, normalise
from deepgrpo.rewards.workers import NotComparableError

# value in the file, answer of the row
VALUES = [
    (0.00001, "0.00001"), (1e22, "10000000000000000000000"), (142.0, "142"), (-0.0, "0"), (1.5e-7, "0.00000015"), (72, "72"),
]  # fmt: skip


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_float_keeps_its_decimal_form(tmp_path: Path, ending: str) -> None:
    rows = [{"question": f"{i}?", "answer": float(value)} for i, (value, _) in enumerate(VALUES)]
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    kind = JsonlData if ending == "jsonl" else ParquetData
    data = kind(path=str(path), template=TemplateConfig(chat=False))
    assert [row.answer for row in read_rows(data, Counter())] == [answer for _, answer in VALUES]


def test_a_decimal_column_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([{"question": "?", "answer": Decimal("0.00000150")}])
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "rows.parquet")
    data = ParquetData(path=str(tmp_path / "rows.parquet"), template=TemplateConfig(chat=False))
    assert [row.answer for row in read_rows(data, Counter())] == ["0.0000015"]


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("so\n#### 1,200", "1200"),
        ("#### -1,200.5", "-1200.5"),
        ("#### (0,100)", "(0,100)"),
        ("#### (100,200)", "(100,200)"),
        ("#### 5,1234", "5,1234"),
        ("#### 1, 200", "1, 200"),
        ("1,200", "1,200"),  # no marker
    ],
)
def test_only_a_whole_number_loses_its_separators(tmp_path: Path, solution: str, answer: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "?", "answer": solution}) + "\n")
    data = JsonlData(path=str(path), columns=ColumnMap(answer_after="####"), template=TemplateConfig(chat=False))
    assert [row.answer for row in read_rows(data, Counter())] == [answer]


FLOATS = st.floats(allow_nan=False, allow_infinity=False)


@given(FLOATS)
@example(1e-05)
@example(5e-324)
@example(1.7976931348623157e308)
def test_a_float_is_read_back_from_its_decimal_form(value: float) -> None:
    form = decimal_form(value)
    assert "e" not in form.lower() and "E" not in form
    number = read_number(form)
    assert number is not None and number.numerator == Decimal(repr(value))
    same = read_number(repr(value))
    assert same is not None and same_number(number, same) and canonical(number) == canonical(same)


@given(st.integers(), st.integers())
@example(10**40, 10**40 + 1)
def test_whole_numbers_are_compared_exactly(one: int, two: int) -> None:
    first, second = read_number(str(one)), read_number(f"{two:,}")
    assert first is not None and second is not None
    assert same_number(first, second) == (one == two)


def test_what_canonical_calls_equal_the_reward_does_too() -> None:
    texts = ["0.5", "1/2", "\\frac12", "50", "50%", "2/6", "1/3", "0.3333333", "1e3", "1,000", "-3", "- 3", "1e999999999"]
    numbers = [read_number(text) for text in texts]
    for one in numbers:
        for two in numbers:
            assert one is not None and two is not None
            assert same_number(one, two) or canonical(one) != canonical(two)


PIECES = [
    "####", "\\boxed", "{", "}", "\\{", "\\\\", "$", "\\(", "\\)", "-", " ", "\n", "3", "1,200", "1e5", "E999999999", "x",
    "=", "the answer is ", "\\frac", "^", "_", "(", ")", "[", "]", ",", ";", "%", "\\text{", "cat", "\\ldots", "...", "\\pm",
    "\\cup", "\\in", "<", "\\le", "<think>", "</think>", ":", "3:45", "July", "\\begin{pmatrix}", "\\end{pmatrix}", "&",
    "\ud800", "\x00", "−", "½", "√", "π", "٣", "²", "９", "million", "0", "1/0", "\\overline{3}", "**", "`", "\\", "and",
    "<answer>", "</answer>",
]  # fmt: skip


@examples(300)
@given(st.lists(st.sampled_from(PIECES), max_size=12), st.lists(st.sampled_from(PIECES), max_size=4))
@example(["((((5))))"], ["\\{\\{"])
def test_no_text_makes_a_reader_raise(pieces: list[str], others: list[str]) -> None:
    text, reference = "".join(pieces), "".join(others)
    for answer_format in ("boxed", "gsm8k", "any"):
        for numeric in (True, False):
            answer = find_answer(text, answer_format, numeric=numeric)
            if answer is not None:
                quick_verdict(answer, (reference,))
                normalise(answer)
    loose_answer(text)
    extract_answer(text, "3")
    assert quick_verdict(text, (text,)) in (True, False)


LONGER = ["((((", "1,", "- ", "the answer is 5. ", "\\(x", "1 1/2 ", "{1}", "\\frac{", "3 million "]


@pytest.mark.parametrize("piece", PIECES + LONGER)
def test_long_texts_take_little_time(piece: str) -> None:
    text = piece * (20_000 // len(piece))
    started = time.process_time()
    for answer_format in ("boxed", "gsm8k", "any"):
        find_answer(text, answer_format)
    read_form(text)
    extract_answer(text, "3")
    find_box(text)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "text",
    [
        "10^{10^{10}}", "9^{9^{9^{9}}}", "7^{999999999}", "((9!)!)!", "1000000!", "\\binom{1000000000}{500000000}",
        "(7^{99999})^{99999}", "e^{e^{e^{e^{10}}}}", "\\prod_{i=1}^{100000000} i", "\\sum_{i=1}^{100000000} i", "x^{1000000}",
        "\\cos(10^{100000000})", "1.5^{999999999}", "10^{-10^{10}}",
    ],
)  # fmt: skip
def test_huge_values_are_refused_before_they_are_computed(text: str) -> None:
    with pytest.raises(NotComparableError):
        check_answer(text, ("x + 5",))


def test_a_refusal_comes_from_a_worker_as_a_problem() -> None:
    reward = MathAnswerReward(MathReward(answer_format="boxed", timeout_s=20))
    prompt = Prompt("p", "text", (1,), "q", "1,2,\\ldots,n", {})
    try:
        scores = reward.score([prompt] * 2, ["\\boxed{1,3,\\ldots,2n-1}", "\\boxed{1, 2, \\ldots, n}"], [(1,)] * 2)
    finally:
        reward.close()
    assert [(score.value, score.problem) for score in scores] == [(0.0, "not comparable"), (1.0, None)]
