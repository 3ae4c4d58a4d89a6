"""Hostile data: each row is used as it reads, skipped under a word, or refused by a sentence; nothing else ever happens."""

from __future__ import annotations

import datetime
import gzip
import json
import math
from collections import Counter, defaultdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepgrpo.config import ColumnMap, JsonlData, ParquetData, TemplateConfig
from deepgrpo.errors import DataError, DeepGRPOError
from deepgrpo.prompts.rows import RawRow, pick
from deepgrpo.prompts.source import build_source
from deepgrpo.records import Credit, Prompt, Tree
from deepgrpo.runs.trees import tree_from_json, tree_to_json
from tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
PLAIN = TemplateConfig(chat=False)
GOOD = b'{"question": "1 + 1?", "answer": "2"}'


def source_of(path: Path, *lines: bytes | str, **fields: Any) -> Any:
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    data = JsonlData(path=str(path), **{"template": PLAIN, **fields})
    return build_source(data, TOKENIZER, seed=0, context=512, shuffle=False)


def accepted(prompt: Prompt) -> list[str]:
    return list(prompt.accepted) or [str(prompt.answer)]


# ---------------------------------------------------------------- encoding


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(r'{"question": "1\ud800", "answer": "1"}', id="question"),
        pytest.param(r'{"question": "1", "answer": "1\ud800"}', id="answer"),
        pytest.param(r'{"question": "1", "answer": ["1", "1\uDFFF"]}', id="one of several answers"),
        pytest.param(r'{"question": "1", "answer": "1", "alt_answers": ["\ud800"]}', id="alternative"),
        pytest.param(r'{"question": "1", "answer": "1", "id": "a\ud800"}', id="id"),
        pytest.param(r'{"question": "1", "answer": "1", "note": "a\udc00\ud800"}', id="a pair the wrong way round"),
        pytest.param(r'{"question": "1", "answer": "1", "note": {"deep": [{"er": "\ud83d"}]}}', id="nested"),
        pytest.param(r'{"question": "1", "answer": "1", "\ud800": 1}', id="name of a column"),
        pytest.param(r'{"question": "1", "answer": "1", "note": {"\ud800": 1}}', id="nested name"),
        pytest.param(b'{"question": "caf\xe9", "answer": "1"}', id="Latin-1"),
        pytest.param(b'{"question": "1", "answer": "1", "note": "\xed\xa0\x80"}', id="a surrogate as bytes"),
    ],
)
def test_a_row_with_bad_encoding_is_counted(tmp_path: Path, row: bytes | str) -> None:
    source = source_of(tmp_path / "d.jsonl", GOOD, row)
    assert ([p.question for p in source.head(9)], source.skipped) == (["1 + 1?"], {"bad encoding": 1})


@pytest.mark.parametrize(
    ("row", "question"),
    [
        pytest.param(r'{"question": "\ud83d\ude00", "answer": "1"}', "\U0001f600", id="a whole pair"),
        pytest.param('{"question": "\U0001f600", "answer": "1"}', "\U0001f600", id="emoji"),
        pytest.param(r'{"question": "a\u0000b", "answer": "1"}', "a\0b", id="NUL"),
        pytest.param(r'{"question": "\u001b[31m\u0085\u2028", "answer": "1"}', "\x1b[31m\x85\u2028", id="control characters"),
        pytest.param(r'{"question": "\\ud800", "answer": "1"}', "\\ud800", id="a backslash of the question's own"),
        pytest.param('{"question": "\ufeffx", "answer": "1"}', "\ufeffx", id="byte order mark inside a text"),
    ],
)
def test_odd_characters_are_kept(tmp_path: Path, row: str, question: str) -> None:
    source = source_of(tmp_path / "d.jsonl", row)
    (prompt,) = source.head(1)
    assert (prompt.question, source.skipped) == (question, {})
    assert bytes(TOKENIZER.decode(prompt.tokens), "utf-8") == question.encode()
    line = tree_to_json(Tree(prompt), Credit((), ()).spans)
    assert len(line.splitlines()) == 1  # by any reader's idea of a line
    assert tree_from_json(line)[0].prompt == prompt


# ---------------------------------------------------------------- form of the file


def as_array(*rows: bytes) -> bytes:
    return b"[\n" + b",\n".join(rows) + b"\n]\n"


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(BOM + GOOD + b"\n" + GOOD, id="byte order mark"),
        pytest.param(GOOD + b"\n" + BOM + GOOD, id="byte order mark of a second file"),
        pytest.param(GOOD + b"\r\n" + GOOD + b"\r\n", id="CRLF"),
        pytest.param(b"\n\n" + GOOD + b"\n \t\r\n" + GOOD + b"\n\n", id="empty lines"),
        pytest.param(BOM + b"\r\n" + GOOD + b"\n" + GOOD, id="byte order mark on an empty line"),
        pytest.param(gzip.compress(GOOD + b"\n" + GOOD), id="gzip"),
        pytest.param(gzip.compress(BOM + GOOD + b"\n" + GOOD), id="gzip with a byte order mark"),
    ],
)
def test_forms_of_a_file_that_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    data = JsonlData(path=str(tmp_path / "d.jsonl"), template=PLAIN)
    source = build_source(data, TOKENIZER, seed=0, context=512)
    assert ([p.question for p in source.head(9)], source.skipped) == (["1 + 1?"] * 2, {})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(GOOD.decode().encode("utf-16"), "d.jsonl is UTF-16, not UTF-8; convert it: iconv -f UTF-16", id="UTF-16"),
        pytest.param(GOOD.decode().encode("utf-16-be"), "d.jsonl is UTF-16, not UTF-8", id="UTF-16 without a mark"),
        pytest.param(GOOD.decode().encode("utf-16-le"), "d.jsonl is UTF-16, not UTF-8", id="UTF-16 LE without a mark"),
        pytest.param(GOOD.decode().encode("utf-32"), "d.jsonl is UTF-32, not UTF-8", id="UTF-32"),
        pytest.param(as_array(GOOD, GOOD), r"is a JSON array.* one object per line; convert it: jq -c '.\[\]'", id="array"),
        pytest.param(b"[" + GOOD + b"]", "d.jsonl is a JSON array", id="array on one line"),
        pytest.param(BOM + b"\n [ " + GOOD, "d.jsonl is a JSON array", id="array behind white space"),
        pytest.param(GOOD + b",\n" + GOOD, "line 1 ends with a comma; delete the comma", id="comma behind a line"),
        pytest.param(GOOD[:-1] + b",}", "line 1 is not valid JSON", id="comma inside"),
        pytest.param(b'{\n  "question": "1",\n  "answer": "2"\n}\n', "line 1 is not valid.*one object per line", id="pretty"),
        pytest.param(GOOD + b"\r" + GOOD, "line 1 has a carriage return", id="old Mac"),
        pytest.param(GOOD + GOOD, "line 1 is not valid JSON", id="two objects on a line"),
        pytest.param(b"\0" * 64, "line 1 is not valid JSON", id="a block of NULs"),
        pytest.param(b"PAR1 and more", 'd.jsonl is a parquet file; set data.type = "parquet"', id="parquet"),
        pytest.param(b"PK\x03\x04 and more", "d.jsonl is a zip file; unpack it", id="zip"),
        pytest.param(b"\x28\xb5\x2f\xfd and more", "d.jsonl is a zstd file; unpack it", id="zstd"),
        pytest.param(gzip.compress(GOOD * 99)[:-9], "d.jsonl.*cannot be read", id="torn gzip"),
        pytest.param(b"", "d.jsonl is empty", id="empty"),
        pytest.param(BOM, "d.jsonl is empty", id="byte order mark alone"),
        pytest.param(b"question,answer\n1,2\n", "line 1 is not valid JSON", id="CSV"),
        pytest.param(b'"text"', "line 1 is a JSON str", id="a text"),
        pytest.param(b"[" * 100_000, "d.jsonl is a JSON array", id="100,000 brackets"),
        pytest.param(b'{"question": ' * 100_000, "line 1 is not valid JSON", id="100,000 braces"),
        pytest.param(b'{"question": "1", "answer": "1", "x": ' + b"[" * 400 + b"]" * 400 + b"}", "line 1.*nested", id="deep"),
    ],
)  # fmt: skip
def test_forms_of_a_file_that_are_refused_by_a_sentence(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=f"(?s){says}"):
        build_source(JsonlData(path=str(tmp_path / "d.jsonl"), template=PLAIN), TOKENIZER, seed=0, context=512)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nobody-of-this-name/d.jsonl", "/dev/null/d.jsonl"])
def test_names_that_no_file_can_have(name: str) -> None:
    for data in (JsonlData(path=name, template=PLAIN), ParquetData(path=name, template=PLAIN)):
        with pytest.raises(DataError, match=r"data\.path"):
            build_source(data, TOKENIZER, seed=0, context=512)


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
        (Decimal("3.50"), ["3.50"]), (Decimal("142.00"), ["142"]), (Decimal("NaN"), NO_ANSWER), (Decimal("1E+3"), ["1000"]),
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
        {"question": "a", "answer": Decimal("3.50"), "alt_answers": [None, "4"], "when": datetime.datetime(2024, 1, 2)},
        {"question": "b", "answer": None, "alt_answers": None, "when": None},
        {"question": None, "answer": Decimal("1.00"), "alt_answers": [], "when": None},
        {"question": "d", "answer": Decimal("1.00"), "alt_answers": [], "when": None},
    ]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "d.parquet")
    data = ParquetData(path=str(tmp_path / "d.parquet"), template=PLAIN)
    source = build_source(data, TOKENIZER, seed=0, context=512, shuffle=False)
    assert [accepted(p) for p in source.head(9)] == [["3.50", "4"], ["1"]]
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


# ---------------------------------------------------------------- anything at all

words = st.text(st.characters(), max_size=8)  # half surrogate pairs included
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["question", "answer", "id", "alt_answers", "note", "metadata"])
ROW = st.dictionaries(names, values, max_size=6) | st.fixed_dictionaries(
    {"question": words, "answer": values, "id": values, "alt_answers": values}
)


@given(st.lists(ROW, min_size=1, max_size=3), st.sampled_from([None, "Q: {question} {note} {metadata.x}"]))
@example([{"question": "1", "answer": "1\ud800"}], None)
@example([{"question": "1", "answer": math.nan}], None)
@example([{"question": "1", "answer": "1", "note": None}], "Q: {question} {note} {metadata.x}")
@settings(max_examples=150, deadline=None)
def test_any_rows_give_prompts_or_one_of_our_errors(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], user: str | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    template = PLAIN if user is None else TemplateConfig(preset="custom", user=user, chat=False)
    try:
        source = source_of(path, *(json.dumps(row) for row in rows), template=template)
    except DeepGRPOError:
        return
    prompts = source.head(9)
    assert len(prompts) + sum(source.skipped.values()) == len(rows)
    for prompt in prompts:
        (prompt.id + prompt.text + "".join(accepted(prompt))).encode()  # never half a pair
        assert not {"None", "nan", "inf", "-inf"} & set(accepted(prompt)) or "None" in json.dumps(rows)
        assert tree_from_json(tree_to_json(Tree(prompt), ()))[0].prompt.text == prompt.text
