"""Reading data: what is skipped and counted, what is an error, and where a cursor goes on."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from deepgrpo.config import ColumnMap, HubData, JsonlData, ParquetData, ReasoningGymData, SyntheticData, TemplateConfig
from deepgrpo.errors import DataError, MissingExtraError
from deepgrpo.prompts import synthetic
from deepgrpo.prompts.source import Cursor, build_source
from tiny import SHARED_DATA

TOKENIZER = synthetic.tokenizer()
PLAIN = TemplateConfig(chat=False)


def write(path: Path, *lines: bytes | str | dict) -> str:
    encoded = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in encoded))
    return str(path)


def jsonl(path: str, **fields) -> JsonlData:
    return JsonlData(path=path, template=PLAIN, **fields)


def source_of(data, **fields):
    return build_source(data, TOKENIZER, **{"seed": 0, "context": 256, **fields})


class TestJsonl:
    def test_a_row_becomes_a_prompt(self, tmp_path):
        path = write(tmp_path / "d.jsonl", {"id": "a", "question": "1+2:", "answer": "3", "note": [1, None]})
        (prompt,) = source_of(jsonl(path)).head(5)
        assert (prompt.id, prompt.text, prompt.question, prompt.answer) == ("a", "1+2:", "1+2:", "3")
        assert prompt.tokens == tuple(TOKENIZER("1+2:")["input_ids"])
        assert prompt.columns == {"id": "a", "question": "1+2:", "answer": "3", "note": [1, None]}

    def test_answers_of_several_kinds(self, tmp_path):
        answers = [72, 142.0, 0.5, ["1/2", 0.5], "025"]
        path = write(tmp_path / "d.jsonl", *({"question": f"{i}:", "answer": a} for i, a in enumerate(answers)))
        prompts = source_of(jsonl(path)).head(9)
        assert [p.answer for p in prompts] == ["72", "142", "0.5", "1/2", "025"]
        assert [p.accepted for p in prompts] == [(), (), (), ("1/2", "0.5"), ()]
        assert [p.id for p in prompts] == ["1", "2", "3", "4", "5"]  # no id column: the line

    def test_rows_that_cannot_be_used_are_counted(self, tmp_path):
        path = write(
            tmp_path / "d.jsonl",
            b"\xef\xbb\xbf" + b'{"question": "1:", "answer": "1"}\r',  # byte order mark and CRLF do no harm
            b'{"question": "\xff", "answer": "1"}',
            "",
            {"question": " ", "answer": "1"},
            {"question": None, "answer": "1"},
            '{"question": "1\\ud800", "answer": "1"}',
            {"question": "1" * 11, "answer": "1"},
            {"question": "1" * 10, "answer": "1"},
        )
        source = source_of(jsonl(path, max_prompt_tokens=10))
        assert source.skipped == {"bad encoding": 2, "empty question": 2, "too long": 1}
        assert [p.id for p in source.head(9)] == ["1", "8"]
        assert len(source) == source.size == 2

    def test_a_row_without_its_answer_is_counted(self, tmp_path):
        answers = [None, [], " ", "3"]
        path = write(tmp_path / "d.jsonl", *({"question": f"{i}:", "answer": a} for i, a in enumerate(answers)))
        source = source_of(jsonl(path))
        assert ([p.id for p in source.head(9)], source.skipped) == (["4"], {"no answer": 3})
        # a reward that needs none says so, and nothing is skipped
        assert len(source_of(jsonl(path, columns=ColumnMap(answer=None)))) == 4

    def test_a_solution_without_an_answer_behind_its_marker_is_counted(self, tmp_path):
        path = write(tmp_path / "d.jsonl", {"question": "1:", "answer": "#### "}, {"question": "2:", "answer": "#### 4"})
        source = source_of(jsonl(path, columns=ColumnMap(answer_after="####")))
        assert ([p.answer for p in source.head(9)], source.skipped) == (["4"], {"no answer": 1})

    @pytest.mark.parametrize("wanted", [63, 64, 1000])
    def test_a_prompt_always_leaves_room_for_a_response(self, tmp_path, wanted):
        path = write(tmp_path / "d.jsonl", *({"question": "1" * n, "answer": "1"} for n in (62, 63, 64, 65)))
        source = source_of(jsonl(path, max_prompt_tokens=wanted), context=64)
        assert ([len(p.tokens) for p in source.head(9)], source.skipped) == ([62, 63], {"too long": 2})

    def test_half_the_context_is_the_default_limit(self, tmp_path):
        path = write(tmp_path / "d.jsonl", *({"question": "1" * n, "answer": "1"} for n in (31, 32, 33)))
        source = source_of(jsonl(path), context=64)
        assert (len(source), source.skipped) == (2, {"too long": 1})

    def test_a_huge_row_is_skipped_quickly(self, tmp_path):
        path = write(
            tmp_path / "d.jsonl", {"question": "1" * 100_000, "answer": "1"}, {"question": "1:", "answer": "1"}
        )
        started = time.process_time()  # another process may have the cores
        assert source_of(jsonl(path)).skipped == {"too long": 1}
        assert time.process_time() - started < 2

    def test_limit_keeps_the_first_rows_and_reads_no_further(self, tmp_path):
        path = write(tmp_path / "d.jsonl", {"question": "1:", "answer": 1}, {"question": "", "answer": 1}, "not JSON")
        source = source_of(jsonl(path, limit=2))
        assert (len(source), source.skipped) == (1, {"empty question": 1})

    def test_other_column_names(self, tmp_path):
        path = write(tmp_path / "d.jsonl", {"problem": "1:", "target": 3, "key": 7, "id": "x", "answer": "other"})
        columns = ColumnMap(id="key", question="problem", answer="target")
        (prompt,) = source_of(jsonl(path, columns=columns)).head(1)
        assert (prompt.id, prompt.question, prompt.answer) == ("7", "1:", "3")
        (prompt,) = source_of(jsonl(path, columns=ColumnMap(id=None, question="problem", answer=None))).head(1)
        assert (prompt.id, prompt.answer) == ("1", None)

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            ([], "is empty; it needs at least one row with a column 'question'"),
            (["", "  "], "is empty"),
            ([{"question": "1:", "answer": 1}, '{"question": '], "line 2 is not valid JSON"),
            (["", "7", "[1, 2]"], r"line 2 is a JSON int \('7'\), not an object; write"),
            (
                [{"prompt": "1:", "answer": 1}],
                "no column 'question' .* its columns are prompt, answer; set data.columns",
            ),
            ([{"question": "1:"}], "no column 'answer' .* set data.columns.answer to one of them, or \"none\""),
            ([{"question": ["1:"], "answer": 1}], "line 1: the question is a list"),
            ([{"question": "1:", "answer": {"a": 1}}], "line 1: the answer in column 'answer' is a dict"),
            (
                [{"id": 5, "question": "1:", "answer": 1}, "", {"id": "5", "question": "2:", "answer": 1}],
                "id '5' is in line 1 and in line 3; make ids unique",
            ),
            (
                [{"question": "", "answer": 1}],
                r"no usable row is left .* \(empty question: 1\); .* data.columns.question",
            ),
            (
                [{"question": "1" * 200, "answer": 1}, {"question": "1" * 300, "answer": 1}],
                r"\(too long: 2\); the shortest prompt has 200 tokens and max_prompt_tokens is 128",
            ),
            (
                [{"question": "1:", "answer": None}, {"question": "2:", "answer": None}],
                r"no usable row is left .* \(no answer: 2\); .* data.columns.answer .* \"none\"",
            ),
        ],
    )
    def test_errors_name_place_and_remedy(self, tmp_path, lines, message):
        with pytest.raises(DataError, match=message):
            source_of(jsonl(write(tmp_path / "d.jsonl", *lines)))

    def test_missing_file_and_directory(self, tmp_path):
        with pytest.raises(DataError, match="does not exist"):
            source_of(jsonl(str(tmp_path / "none.jsonl")))
        with pytest.raises(DataError, match="is a directory; name a file"):
            source_of(jsonl(str(tmp_path)))


class TestOrder:
    def source(self, tmp_path, seed=0, shuffle=True):
        path = write(tmp_path / "d.jsonl", *({"question": f"{i}:", "answer": i} for i in range(10)))
        return source_of(jsonl(path), seed=seed, shuffle=shuffle)

    def ids(self, prompts):
        return [p.question.rstrip(":") for p in prompts]

    def test_every_epoch_has_an_order_of_its_own(self, tmp_path):
        source = self.source(tmp_path)
        first, cursor = source.take(Cursor(), 10)
        second, _ = source.take(cursor, 10)
        assert cursor == Cursor(epoch=1, position=0)
        assert self.ids(first) != self.ids(second)
        assert set(self.ids(first)) == set(self.ids(second)) == set("0123456789")
        assert self.ids(first) != self.ids(self.source(tmp_path, seed=1).take(Cursor(), 10)[0])

    def test_a_batch_may_reach_over_the_end_of_an_epoch(self, tmp_path):
        source = self.source(tmp_path, shuffle=False)
        prompts, cursor = source.take(Cursor(0, 8), 14)
        assert self.ids(prompts) == list("89012345678901")
        assert cursor == Cursor(2, 2) and source.metrics(cursor) == {"data/epochs": 2.2}

    def test_a_cursor_survives_json(self, tmp_path):
        cursor = Cursor(3, 4)
        assert Cursor.from_dict(json.loads(json.dumps(cursor.to_dict()))) == cursor
        assert self.source(tmp_path).take(cursor, 3) == self.source(tmp_path).take(cursor, 3)

    def test_head_is_not_shuffled(self, tmp_path):
        assert self.ids(self.source(tmp_path).head(3)) == ["0", "1", "2"]


class TestSynthetic:
    def test_endless(self):
        data = SyntheticData()
        source = source_of(data)
        prompts, cursor = source.take(Cursor(0, 3), 2)
        assert [p.question for p in prompts] == [synthetic.make(i, data).question for i in (3, 4)]
        assert prompts[0].text == prompts[0].question  # chat is on by default, but this tokenizer has no template
        assert (cursor, source.size, source.metrics(cursor), bool(source)) == (Cursor(0, 5), None, {}, True)
        assert source.head(1)[0].question == synthetic.make(0, data).question
        with pytest.raises(TypeError, match="no length"):
            len(source)

    def test_size_and_limit_make_it_finite(self):
        assert len(source_of(SyntheticData(size=20))) == 20
        assert len(source_of(SyntheticData(size=20, limit=5))) == 5
        assert len(source_of(SyntheticData(limit=7))) == 7

    @pytest.mark.parametrize("size", [None, 3])
    def test_prompts_that_never_fit(self, size):
        with pytest.raises(DataError, match="shortest prompt has 14 tokens and max_prompt_tokens is 8"):
            source_of(SyntheticData(size=size), context=16)


class TestOtherFiles:
    ROWS = ({"id": "a", "question": "1:", "answer": 1}, {"id": "b", "question": "2:", "answer": 2})

    def check(self, data):
        prompts = source_of(data).head(5)
        assert [(p.id, p.question, p.answer) for p in prompts] == [("a", "1:", "1"), ("b", "2:", "2")]
        assert len(source_of(data.model_copy(update={"limit": 1}))) == 1

    def test_parquet(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "d.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(list(self.ROWS)), path)
        self.check(ParquetData(path=str(path), template=PLAIN))
        path.write_bytes(b"no parquet")
        with pytest.raises(DataError, match="not a readable parquet file"):
            source_of(ParquetData(path=str(path), template=PLAIN))

    @pytest.mark.parametrize("kind", ["file", "directory", "saved"])
    def test_hub_form_of_local_data(self, tmp_path, monkeypatch, kind):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        place = tmp_path / "data"
        place.mkdir()
        write(place / "train.jsonl", *self.ROWS)
        path = {"file": place / "train.jsonl", "directory": place, "saved": tmp_path / "saved"}[kind]
        if kind == "saved":
            datasets.Dataset.from_list(list(self.ROWS)).save_to_disk(str(path))
        self.check(HubData(path=str(path), template=PLAIN))

    def test_hub_errors_name_what_was_asked_for(self, tmp_path):
        pytest.importorskip("datasets")
        write(tmp_path / "train.jsonl", *self.ROWS)
        with pytest.raises(DataError, match=r"data.split = 'dev'"):
            source_of(HubData(path=str(tmp_path), split="dev", template=PLAIN))

    @pytest.mark.parametrize(
        ("module", "data", "extra"),
        [
            ("pyarrow", ParquetData(path=__file__, template=PLAIN), "data"),
            ("datasets", HubData(path="x", template=PLAIN), "data"),
            ("reasoning_gym", ReasoningGymData(task="chain_sum", template=PLAIN), "gym"),
        ],
    )
    def test_a_missing_extra_names_the_install_command(self, monkeypatch, module, data, extra):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=rf'pip install "deepgrpo\[{extra}\]"'):
            source_of(data)


def words():
    """A word-level tokenizer that knows every text, by an unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data sets are not here")
class TestSharedData:
    def test_gsm8k_loads_in_seconds(self):
        tokenizer = words()
        started = time.process_time()  # another process may have the cores
        data = jsonl(str(SHARED_DATA / "gsm8k_train.jsonl"))
        source = build_source(data, tokenizer, seed=0, context=2048)
        assert time.process_time() - started < 3
        assert (len(source), source.skipped) == (7473, {})
        first = source.head(1)[0]
        assert (first.id, first.answer) == ("gsm8k-train-00000", "72")
        assert first.columns["solution"].endswith("#### 72")

    @pytest.mark.parametrize(
        ("name", "count"), [("aime24", 30), ("amc", 83), ("math500", 500), ("minerva", 272), ("olympiad_bench", 675)]
    )
    def test_evaluation_sets_load_whole(self, name, count):
        source = build_source(jsonl(str(SHARED_DATA / f"{name}.jsonl")), words(), seed=0, context=8192)
        assert (len(source), source.skipped) == (count, {})


def test_answer_after_a_marker_and_alternatives(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"question": "1+2:", "answer": "3*400 = 1200\\n#### 1,200"}\n'
        '{"question": "1+3:", "answer": "9.6", "alt_answers": ["9.60", "9.6"]}\n'
        '{"question": "1+4:", "answer": "1,200", "alt_answers": null}\n'
    )
    source = source_of(jsonl(str(path), columns=ColumnMap(answer_after="####")))
    first, second, third = source.head(3)
    assert (first.answer, first.accepted) == ("1200", ())
    assert (second.answer, second.accepted) == ("9.6", ("9.6", "9.60"))
    assert (third.answer, third.accepted) == ("1,200", ())
