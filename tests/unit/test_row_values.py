"""Values of a row: which are a question, an answer, an id; only documented columns act; typed columns of parquet files."""

from __future__ import annotations

import datetime
import math
from collections import Counter, defaultdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepgrpo.config import ColumnMap, JsonlData, ParquetData, TemplateConfig
from deepgrpo.errors import DataError
from deepgrpo.prompts.rows import RawRow, pick
from deepgrpo.prompts.source import build_source
from deepgrpo.records import Prompt, Tree
from deepgrpo.runs.trees import tree_from_json, tree_to_json
from tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
PLAIN = TemplateConfig(chat=False)
GOOD = b'{"question": "1 + 1?", "answer": "2"}'


def source_of(path: Path, *lines: str, **fields: Any) -> Any:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    data = JsonlData(path=str(path), template=PLAIN, **fields)
    return build_source(data, TOKENIZER, seed=0, context=512, shuffle=False)


def accepted(prompt: Prompt) -> list[str]:
    return list(prompt.accepted) or [str(prompt.answer)]


# ---------------------------------------------------------------- values


NO_ANSWER, ERROR = "no answer", "error"


class NAType:
    """As pandas': no comparison with it is true or false."""

    def __repr__(self) -> str:
        return "<NA>"

    def __eq__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("72", ["72"]), (72, ["72"]), (142.0, ["142"]), (0.5, ["0.5"]), (0.00001, ["0.00001"]),
        (4.5e33, ["45" + "0" * 32]), (-0.0, ["0"]), (10**30, ["1" + "0" * 30]),
        (None, NO_ANSWER), ("", NO_ANSWER), (" \n", NO_ANSWER), ([], NO_ANSWER), ([None], NO_ANSWER), (["", " "], NO_ANSWER),
        (math.nan, NO_ANSWER), (math.inf, NO_ANSWER), (-math.inf, NO_ANSWER), ([math.nan], NO_ANSWER),
        (["1/2", 0.5], ["1/2", "0.5"]), (["5", None, ""], ["5"]), ([math.nan, 7], ["7"]), (("a", "b"), ["a", "b"]),
        (["5", "5"], ["5"]),
        (True, ERROR), ([True], ERROR), ({"a": 1}, ERROR), ([["1"]], ERROR), ([{"a": 1}], ERROR), (b"72", ERROR),
        (datetime.date(2024, 1, 2), ERROR), (datetime.datetime(2024, 1, 2), ERROR), (1j, ERROR), ({1}, ERROR),
        (Decimal("3.25"), ["3.25"]), (Decimal("142.00"), ["142"]), (Decimal("NaN"), NO_ANSWER), (Decimal("1E+3"), ["1000"]),
        (np.int64(7), ["7"]), (np.float32(0.5), ["0.5"]), (np.float64("nan"), NO_ANSWER), (np.str_("x"), ["x"]),
        (np.bool_(True), ERROR), (np.array([1, 2]), ["1", "2"]), (np.datetime64("2024-01-02"), ERROR),
        (NAType(), NO_ANSWER), ([NAType(), "1"], ["1"]),
    ],
    ids=repr,
)  # fmt: skip
def test_values_that_are_an_answer(answer: Any, outcome: Any) -> None:
    skipped: Counter[str] = Counter()
    rows = [RawRow(1, {"question": "q", "answer": answer})]
    if outcome == ERROR:
        with pytest.raises(DataError, match=r"d, line 1: the answer in column 'answer' is a .*a text, a number or a list"):
            pick(rows, ColumnMap(), "d", "line", skipped)
        return
    found = pick(rows, ColumnMap(), "d", "line", skipped)
    if outcome == NO_ANSWER:
        assert (found, skipped) == ([], {NO_ANSWER: 1})
    else:
        answer = found[0].answer
        assert (answer if isinstance(answer, list) else [answer]) == outcome
        assert not skipped


@pytest.mark.parametrize(
    ("question", "outcome"),
    [
        ("q", "q"), (7, "7"), (7.0, "7"), (None, None), ("", None), (math.nan, None), (math.inf, None), (NAType(), None),
        (np.str_("q"), "q"), (True, ERROR), ({"a": 1}, ERROR), (["q"], ERROR), (b"q", ERROR),
        (datetime.date(2024, 1, 2), ERROR),
    ],
    ids=repr,
)  # fmt: skip
def test_values_that_are_a_question(question: Any, outcome: Any) -> None:
    skipped: Counter[str] = Counter()
    rows = [RawRow(1, {"question": question, "answer": "1"})]
    if outcome == ERROR:
        with pytest.raises(DataError, match="d, line 1: the question is a "):
            pick(rows, ColumnMap(), "d", "line", skipped)
        return
    found = pick(rows, ColumnMap(), "d", "line", skipped)
    assert ([row.question for row in found], dict(skipped)) == (
        ([], {"empty question": 1}) if outcome is None else ([outcome], {})
    )


def test_only_documented_columns_act(tmp_path: Path) -> None:
    """`alternatives` is documented; `accepted_answers` is a column like any other."""
    source = source_of(
        tmp_path / "d.jsonl",
        '{"question": "1", "answer": "5", "accepted_answers": ["6"], "answers": ["7"], "solution": "#### 8"}',
        '{"question": "2", "answer": "5", "alt_answers": [null, "", "6", 7.0]}',
        '{"question": "3", "answer": "5", "alt_answers": "6"}',
        '{"question": "4", "answer": ["5", "6"], "alt_answers": ["6", "7"]}',
        '{"question": "5", "answer": null, "alt_answers": ["6"]}',
        '{"question": "6", "answer": "5", "alt_answers": null}',
    )
    assert [accepted(prompt) for prompt in source.head(9)] == [["5"], ["5", "6", "7"], ["5", "6"], ["5", "6", "7"], ["5"]]
    assert source.skipped == {"no answer": 1}
    assert source.head(1)[0].columns["accepted_answers"] == ["6"]
    with pytest.raises(DataError, match="line 1: the answer in column 'alt_answers' is a dict"):
        source_of(tmp_path / "d.jsonl", '{"question": "1", "answer": "5", "alt_answers": {"a": 1}}')
    off = source_of(
        tmp_path / "d.jsonl", '{"question": "2", "answer": "5", "alt_answers": ["6"]}',
        columns=ColumnMap(alternatives=None),
    )  # fmt: skip
    assert accepted(off.head(1)[0]) == ["5"]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("a", "a"), (7, "7"), (7.0, "7"), (None, "1"), (math.nan, "1"), ("", "1"), (" ", "1"), ("é\0\x1f\n", "é\0\x1f\n"),
        ("x" * 5000, "x" * 5000), (np.int64(7), "7"), ([1], ERROR), ({"a": 1}, ERROR), (True, ERROR), (b"a", ERROR),
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_ids(given: Any, name: str) -> None:
    rows = [RawRow(1, {"question": "q", "answer": "1", "id": given})]
    if name == ERROR:
        with pytest.raises(DataError, match=r"d, line 1: the id in column 'id' is a .*data.columns.id"):
            pick(rows, ColumnMap(), "d", "line", Counter())
    else:
        assert [row.id for row in pick(rows, ColumnMap(), "d", "line", Counter())] == [name]


# ---------------------------------------------------------------- parquet


def test_parquet_with_nulls_and_typed_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"question": "a", "answer": Decimal("3.25"), "alt_answers": [None, "4"], "when": datetime.datetime(2024, 1, 2)},
        {"question": "b", "answer": None, "alt_answers": None, "when": None},
        {"question": None, "answer": Decimal("1.00"), "alt_answers": [], "when": None},
        {"question": "d", "answer": Decimal("1.00"), "alt_answers": [], "when": None},
    ]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "d.parquet")
    data = ParquetData(path=str(tmp_path / "d.parquet"), template=PLAIN)
    source = build_source(data, TOKENIZER, seed=0, context=512, shuffle=False)
    assert [accepted(p) for p in source.head(9)] == [["3.25", "4"], ["1"]]
    assert source.skipped == {"no answer": 1, "empty question": 1}
    assert tree_from_json(tree_to_json(Tree(source.head(1)[0]), ()))[0].prompt.columns["when"] == "2024-01-02 00:00:00"


def test_float32_keeps_its_digits(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array([0.1, None, 1e-5, float("nan"), 142], pyarrow.float32())
    parquet.write_table(pyarrow.table({"question": list("abcde"), "answer": column}), tmp_path / "d.parquet")
    data = ParquetData(path=str(tmp_path / "d.parquet"), template=PLAIN)
    source = build_source(data, TOKENIZER, seed=0, context=512, shuffle=False)
    assert ([p.answer for p in source.head(9)], source.skipped) == (["0.1", "0.00001", "142"], {"no answer": 2})


def test_columns_that_json_cannot_hold_are_saved_as_text() -> None:
    """reasoning-gym's and a Hugging Face data set's columns are Python objects."""
    deep: Any = None
    for _ in range(100):
        deep = [deep]
    columns = {
        "pairs": {(1, 2): "x"}, "many": defaultdict(list, a=[1]), "nan": math.nan, "set": {1}, "bytes": b"x", "deep": deep,
        "object": object,
    }  # fmt: skip
    found = tree_from_json(tree_to_json(Tree(Prompt("p", "q", (1,), "q", "1", columns)), ()))[0].prompt.columns
    assert found == {
        "pairs": {"(1, 2)": "x"}, "many": {"a": [1]}, "nan": None, "set": [1], "bytes": "b'x'", "deep": deep,
        "object": "<class 'object'>",
    }  # fmt: skip


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = pyarrow.array([b"fine", b"caf\xe9", b"good"]).view(pyarrow.string())
    table = pyarrow.table({"question": raw, "answer": ["1", "2", "3"]})
    parquet.write_table(table, tmp_path / "d.parquet")
    data = ParquetData(path=str(tmp_path / "d.parquet"), template=PLAIN)
    source = build_source(data, TOKENIZER, seed=0, context=512, shuffle=False)
    assert ([p.question for p in source.head(9)], source.skipped) == (["fine", "good"], {"bad encoding": 1})


@pytest.mark.parametrize("damage", ["torn", "not parquet"])
def test_damaged_parquet(tmp_path: Path, damage: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.table({"question": ["q"] * 99, "answer": ["1"] * 99}), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "torn" else GOOD)
    with pytest.raises(DataError, match="is not a readable parquet file"):
        build_source(ParquetData(path=str(path), template=PLAIN), TOKENIZER, seed=0, context=512)
