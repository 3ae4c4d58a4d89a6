"""Hostile data: each row is used as it reads, skipped under a word, or refused by a sentence; nothing else ever happens."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypotheses import examples
from hypothesis import example, given
from hypothesis import strategies as st

from deepgrpo.config import JsonlData, ParquetData, TemplateConfig
from deepgrpo.errors import DataError, DeepGRPOError
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
@examples(150)
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
