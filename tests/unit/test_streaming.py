"""Data read when they are needed: their order, their place, what is skipped and what the fingerprint covers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepgrpo.config import ColumnMap, HubData, JsonlData, ParquetData, TemplateConfig
from deepgrpo.errors import DataError
from deepgrpo.prompts import lines, streaming
from deepgrpo.prompts.lines import index_lines
from deepgrpo.prompts.permutation import Permutation
from deepgrpo.prompts.source import Cursor, PromptSource, build_source
from deepgrpo.records import Prompt
from tiny import byte_tokenizer, write_jsonl

TOKENIZER = byte_tokenizer()
PLAIN = TemplateConfig(chat=False)
ROWS = [{"id": f"row-{i}", "question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(300)]


def jsonl(path: Path, rows: list[Any], **fields: Any) -> JsonlData:
    return JsonlData(path=write_jsonl(path, rows), template=PLAIN, **{"streaming": True, **fields})


def source_of(data: Any, seed: int = 0, shuffle: bool = True, context: int = 512) -> PromptSource:
    return build_source(data, TOKENIZER, seed=seed, context=context, shuffle=shuffle)


def ids(prompts: tuple[Prompt, ...]) -> list[str]:
    return [prompt.id for prompt in prompts]


# ---------------------------------------------------------------- the order


@given(st.integers(1, 400), st.integers(0, 3), st.integers(0, 3))
@example(1, 0, 0)
@example(2, 0, 0)
@example(257, 1, 2)
@settings(deadline=None, max_examples=40)
def test_an_order_computed_by_address_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = Permutation(size, seed, "shuffle", epoch)
    assert sorted(order(range(size))) == list(range(size))
    assert order([size - 1, 0]) == [order(range(size))[-1], order(range(size))[0]]


def test_the_order_looks_random() -> None:
    """Of 200 orders of 8, each number is about 25 times at each place: chi-square of 49 degrees, 85 has p = 0.001."""
    counts = Counter((place, row) for seed in range(200) for place, row in enumerate(Permutation(8, seed)(range(8))))
    assert sum((counts[place, row] - 25) ** 2 / 25 for place in range(8) for row in range(8)) < 85
    apart = [
        abs(a - b) for a, b in zip(Permutation(10**9, 1)(range(100)), Permutation(10**9, 1)(range(1, 101)), strict=True)
    ]
    assert min(apart) > 10**5  # neighbours are not neighbours


# ---------------------------------------------------------------- JSONL by lines


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_CHUNK", 50)
    monkeypatch.setattr(lines, "_EVERY", 4)


@pytest.mark.parametrize("end", [b"\n", b"", b"\n\n"])
def test_every_line_is_found(tmp_path: Path, small_chunks: None, end: bytes) -> None:
    texts = [json.dumps({"n": i, "pad": "x" * (i % 7)}) for i in range(23)]
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode() + end)
    index = index_lines(path, "d.jsonl")
    assert index.count == 23 + (end == b"\n\n")
    for order in (range(23), range(22, -1, -1), [7, 8, 3]):
        assert [row["n"] for row in index.read(list(order))] == list(order)  # type: ignore[index]
    if end == b"\n\n":
        assert index.read([23]) == [False]


def test_all_rows_come_once_an_epoch_and_every_epoch_in_another_order(tmp_path: Path) -> None:
    source = source_of(jsonl(tmp_path / "d.jsonl", ROWS))
    assert (source.size, source.described) == (300, "300 rows, read when they are needed")
    first, cursor = source.take(Cursor(), 300)
    second, after = source.take(cursor, 300)
    assert (cursor, after) == (Cursor(1, 0), Cursor(2, 0))
    assert sorted(ids(first)) == sorted(ids(second)) == sorted(row["id"] for row in ROWS)
    assert len({tuple(ids(first)), tuple(ids(second)), tuple(row["id"] for row in ROWS)}) == 3
    assert ids(source.head(3)) == ["row-0", "row-1", "row-2"]
    assert ids(source_of(jsonl(tmp_path / "d.jsonl", ROWS), shuffle=False).take(Cursor(0, 2), 2)[0]) == [
        "row-2",
        "row-3",
    ]


def test_a_streamed_prompt_is_the_loaded_one(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", ROWS[:20])
    streamed, whole = source_of(data), source_of(data.model_copy(update={"streaming": False}))
    assert sorted(streamed.take(Cursor(), 20)[0], key=lambda p: p.id) == sorted(
        whole.take(Cursor(), 20)[0], key=lambda p: p.id
    )
    assert streamed.head(7) == whole.head(7)


@given(st.integers(0, 700), st.integers(1, 40), st.integers(1, 40))
@example(295, 10, 3)
@settings(deadline=None, max_examples=15)
def test_a_cursor_is_a_place(shared_source: PromptSource, start: int, first: int, second: int) -> None:
    """Taking a, then b, is taking a + b; with skipped rows, and across the end of an epoch."""
    cursor = Cursor(start // 300, start % 300)
    together, end = shared_source.take(cursor, first + second)
    a, middle = shared_source.take(cursor, first)
    b, after = shared_source.take(Cursor.from_dict(json.loads(json.dumps(middle.to_dict()))), second)
    assert (a + b, after) == (together, end)


@pytest.fixture(scope="module")
def shared_source(tmp_path_factory: pytest.TempPathFactory) -> PromptSource:
    rows: list[Any] = [{**row, "answer": "" if i % 5 == 0 else row["answer"]} for i, row in enumerate(ROWS)]
    return source_of(jsonl(tmp_path_factory.mktemp("d") / "d.jsonl", rows))


def test_rows_left_out_are_counted_when_their_turn_comes(tmp_path: Path) -> None:
    rows: list[Any] = [
        *ROWS[:4],
        {"question": "1" * 300, "answer": "1"},
        b"",
        b'{"question": "\xff"}',
        {"question": " ", "answer": 1},
    ]
    source = source_of(jsonl(tmp_path / "d.jsonl", rows))
    assert (source.size, source.skipped) == (8, {})
    prompts, cursor = source.take(Cursor(), 4)
    prompts, cursor = source.take(cursor, 4)
    assert {"row-0", "row-1", "row-2", "row-3"} == set(ids(prompts))
    # a blank line is no row; of the last epoch, some rows are still to come
    assert 3 <= cursor.skipped <= 6 and source.metrics(cursor)["data/skipped"] == cursor.skipped
    assert source.metrics(Cursor(2, 2, skipped=5)) == {"data/epochs": 2.25, "data/skipped": 5.0}


def test_shards_have_ids_and_places_of_their_own(tmp_path: Path) -> None:
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"question": f"{name}{i}", "answer": "1"} for i in range(3)])
    expected = ["a:1", "a:2", "a:3", "b:1", "b:2", "b:3"]
    for path in (str(tmp_path), str(tmp_path / "[ab].jsonl")):
        for streaming_ in (True, False):
            assert ids(source_of(JsonlData(path=path, template=PLAIN, streaming=streaming_)).head(9)) == expected
    write_jsonl(tmp_path / "b.jsonl", [{"question": "b", "answer": "1"}, {"qestion": "b"}])
    for streaming_ in (True, False):
        with pytest.raises(
            DataError, match=r"b\.jsonl, line 2 has no column 'question' \(the question\); did you mean 'qestion'"
        ):
            source_of(JsonlData(path=str(tmp_path), template=PLAIN, streaming=streaming_)).head(9)


@pytest.mark.parametrize(
    ("rows", "fields", "says"),
    [
        ([], {}, "is empty; it needs at least one row with a column 'question'"),
        ([{"prompt": "1"}], {}, "line 1 has no column 'question'"),
        ([{"question": "", "answer": 1}] * 3, {}, r"no usable row .* among its first 3 \(empty question: 3\)"),
        ([{"question": "1:", "answer": 1}, b"["], {}, "line 2 is not valid JSON"),
    ],
)
def test_errors_come_before_the_first_step(tmp_path: Path, rows: list[Any], fields: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        source_of(jsonl(tmp_path / "d.jsonl", rows, **fields))


def test_two_rows_of_one_id_in_a_batch(tmp_path: Path) -> None:
    rows = [{"id": "same", "question": f"{i}", "answer": "1"} for i in range(3)]
    source = source_of(jsonl(tmp_path / "d.jsonl", rows))
    with pytest.raises(DataError, match=r"id 'same' is in line \d and in line \d; make ids unique"):
        source.take(Cursor(), 2)
    numbered = source_of(jsonl(tmp_path / "d.jsonl", rows, columns=ColumnMap(id=None)))
    assert len(numbered.take(Cursor(), 7)[0]) == 7  # more than there are: a row may come again


def test_data_that_no_row_of_is_usable_end(tmp_path: Path) -> None:
    source = source_of(jsonl(tmp_path / "d.jsonl", ROWS[:3]))
    (tmp_path / "d.jsonl").write_text("\n" * 3)  # as if the rest of a file were all too long
    with pytest.raises(
        DataError, match="no usable row is left in the data of type 'streamed', read from one end to the other"
    ):
        source.take(Cursor(), 1)


def test_gzipped_lines_have_no_addresses(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"question": "1", "answer": "1"}\n'))
    with pytest.raises(
        DataError, match=r"is gzipped, and data.streaming reads lines by their place in the file; unpack it"
    ):
        source_of(JsonlData(path=str(tmp_path / "d.jsonl.gz"), template=PLAIN, streaming=True))


def test_large_data_are_streamed_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = jsonl(tmp_path / "d.jsonl", ROWS, streaming=None)
    assert "read when" not in source_of(data).described
    monkeypatch.setattr(streaming, "LARGE_JSONL", 1000)
    assert "read when" in source_of(data).described
    assert "read when" not in source_of(data.model_copy(update={"limit": 10})).described
    assert "read when" not in source_of(data.model_copy(update={"streaming": False})).described


def test_the_fingerprint_covers_every_byte_and_the_first_prompts(tmp_path: Path) -> None:
    rows = [{**row, "note": "a"} for row in ROWS]
    digest = source_of(jsonl(tmp_path / "d.jsonl", rows)).digest
    assert source_of(jsonl(tmp_path / "copy.jsonl", rows)).digest == digest
    rows[299]["note"] = "b"
    assert source_of(jsonl(tmp_path / "d.jsonl", rows)).digest != digest
    rows[299]["note"] = "a"
    wording = TemplateConfig(chat=False, preset="math")
    assert source_of(jsonl(tmp_path / "d.jsonl", rows)).digest == digest
    other = JsonlData(path=str(tmp_path / "d.jsonl"), template=wording, streaming=True)
    assert source_of(other).digest != digest


# ---------------------------------------------------------------- parquet, save_to_disk, streams without addresses


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_list(
        [{**row, "prompt": [{"role": "user", "content": row["question"]}]} for row in ROWS]
    )
    for number in range(3):
        table.shard(3, number).to_parquet(str(tmp_path / "shards" / f"train-{number:05}-of-00003.parquet"))
    datasets.DatasetDict({"train": table, "test": table.select(range(5))}).save_to_disk(str(tmp_path / "saved"))
    return tmp_path


COLUMNS = ColumnMap(question="prompt")


def kinds(place: Path) -> dict[str, Any]:
    chat = {"columns": COLUMNS, "streaming": True}
    return {
        "parquet": ParquetData(path=str(place / "shards"), **chat),
        "saved": HubData(path=str(place / "saved"), **chat),
        "stream": HubData(path=str(place / "shards"), shuffle_window=32, **chat),
    }


def test_tables_on_disk(tables: Path) -> None:
    """All forms give all rows once an epoch, go on exactly at a saved cursor, and hold prompts of messages."""
    for name, data in kinds(tables).items():
        source = source_of(data)
        first, cursor = source.take(Cursor(), 150)
        rest, end = source.take(Cursor.from_dict(json.loads(json.dumps(cursor.to_dict()))), 150)
        assert sorted(ids(first + rest)) == sorted(row["id"] for row in ROWS), name
        assert first[0].text == f"<|user|>{first[0].question}\n<|assistant|>", name
        again, _ = source_of(data).take(Cursor.from_dict(json.loads(json.dumps(cursor.to_dict()))), 150)
        assert again == rest, name
        following, _ = source.take(end, 150)
        assert set(ids(following)) != set(ids(first)) and following == source_of(data).take(end, 150)[0], name
        assert ids(source.head(3)) == ["row-0", "row-1", "row-2"], name
        whole = source_of(data.model_copy(update={"streaming": False}))
        assert {p.tokens for p in whole.head(300)} == {p.tokens for p in first + rest}, name


def test_a_stream_without_addresses_is_shuffled_in_windows_of_shards(tables: Path) -> None:
    source = source_of(kinds(tables)["stream"])
    numbers = [int(name.removeprefix("row-")) for name in ids(source.take(Cursor(), 32)[0])]
    assert (max(numbers) - min(numbers), numbers != sorted(numbers)) == (31, True)  # a window of neighbours
    # without its place, the cursor leads to the same rows
    _, cursor = source.take(Cursor(), 77)
    assert cursor.place is not None and cursor.place["window"] == 2
    bare = Cursor(cursor.epoch, cursor.position)
    assert source_of(kinds(tables)["stream"]).take(bare, 50)[0] == source.take(cursor, 50)[0]
    # resumed again and again, also twice in one window
    place, resumed = Cursor(), ()
    for _ in range(6):
        prompts, place = source_of(kinds(tables)["stream"]).take(Cursor.from_dict(json.loads(json.dumps(place.to_dict()))), 13)
        resumed += prompts
    assert resumed == source.take(Cursor(), 78)[0]
    limited = source_of(kinds(tables)["stream"].model_copy(update={"limit": 40}))
    prompts, after = limited.take(Cursor(), 40)
    assert sorted(ids(prompts)) == sorted(row["id"] for row in ROWS[:40])
    assert limited.take(after, 1)[1].epoch == 1


def test_a_directory_with_several_splits_is_refused(tables: Path) -> None:
    (tables / "shards" / "test-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"has shards of several splits \(test, train\); name those of one, e.g. data.path = .*train-\*"
    ):
        source_of(kinds(tables)["parquet"])
    with pytest.raises(DataError, match=r'is a folder of `save_to_disk`; set data.type = "hf"'):
        source_of(ParquetData(path=str(tables / "saved")))
