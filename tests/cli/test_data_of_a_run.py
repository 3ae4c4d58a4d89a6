"""Data in a whole run: rows that are left out, data that changed before a resume, texts that no file takes.

Everything goes through the command line's `main`, in this process.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from deepgrpo import cli, rng
from deepgrpo.errors import ConfigError, DataError
from deepgrpo.eval.command import evaluate_model
from deepgrpo.eval.options import EvalOptions
from deepgrpo.runs.trees import load_trees
from deepgrpo.train.log import RunLog
from recipes import ON_DISK, recipe_text
from tiny import save_model, write_jsonl

RECIPE = recipe_text(
    ON_DISK, run={"steps": 1}, reward={"type": "exact", "truncated_value": "none"}, sampling={"max_new_tokens": 4},
    explore={"type": "root", "num_rollouts": 2}, log={"trees_every": 1},
)  # fmt: skip
ROWS = [{"id": f"row-{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(8)]
HELD_OUT = ("--eval.data", '{type = "jsonl", path = "held_out.jsonl"}', "--eval.every", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    write_jsonl(tmp_path / "data.jsonl", ROWS)
    write_jsonl(tmp_path / "held_out.jsonl", ROWS[:3])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def deepgrpo(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["train", *arguments])
        return (code, *capsys.readouterr())

    return call


# ---------------------------------------------------------------- rows left out


def test_held_out_rows_that_are_left_out_are_told(deepgrpo: Any, place: Path) -> None:
    long, bad = {"question": "x" * 5000, "answer": "1"}, rb'{"question": "1\ud800", "answer": "1"}'
    write_jsonl(place / "held_out.jsonl", [ROWS[0], long, bad, ROWS[1]])
    write_jsonl(place / "data.jsonl", [*ROWS, bad])
    code, out, err = deepgrpo("tiny.toml", "--dry-run", *HELD_OUT)
    assert (code, err) == (0, "")
    shown = [" ".join(line.replace("│", "").split()) for line in out.splitlines()]
    assert {"rows skipped: bad encoding 1", "rows of eval.data skipped: bad encoding 1"} <= set(shown)
    assert {"prompts of an evaluation 2", "rows of eval.data skipped: too long 1"} <= set(shown)
    code, out, err = deepgrpo("tiny.toml", *HELD_OUT)
    assert (code, err) == (0, "")
    assert "rows skipped: 1 bad encoding\n" in out
    assert "rows of eval.data skipped: 1 bad encoding, 1 too long\n" in out
    assert "on 2 held-out questions" in out
    write_jsonl(place / "held_out.jsonl", [long])
    code, _, err = deepgrpo("tiny.toml", "--run.name", "other", *HELD_OUT)
    assert code == 1 and "error: eval.data: no usable row is left in the data of type 'jsonl' (too long: 1)" in err


def test_a_template_that_no_row_fills_ends_before_the_run(deepgrpo: Any, place: Path) -> None:
    code, _, err = deepgrpo("tiny.toml", "--data.template", '{preset = "custom", user = "Q: {qestion}"}')
    assert code == 2 and "error: template.user has the placeholder {qestion}, which no row has; did you mean {question}?" in err
    assert not (place / "runs").exists()


def test_a_chat_template_that_the_model_lacks(deepgrpo: Any) -> None:
    code, _, err = deepgrpo("demo", "--data.template.chat", "true", "--dry-run")
    assert code == 1 and "template.chat is true, but the tokenizer" in err and "has no chat template" in err
    assert deepgrpo("demo", "--dry-run")[0] == 0


def test_bytes_that_are_not_utf8_on_the_command_line(deepgrpo: Any, place: Path) -> None:
    """Python hands such a byte on as half a surrogate pair."""
    code, _, err = deepgrpo("tiny.toml", "--data.template", '{preset = "custom", user = "{question}\udcff"}')
    assert code == 2 and "data.template.user is '{question}\\udcff'; it should be text in UTF-8" in err
    code, _, err = deepgrpo("tiny.toml", "--run.name", "caf\udce9")
    assert code == 2 and "run.name is 'caf\\udce9'; it should be text in UTF-8" in err
    assert not (place / "runs").exists()


# ---------------------------------------------------------------- resume


def files(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and path.name != ".lock"}


@pytest.fixture
def run(deepgrpo: Any, place: Path) -> Path:
    code, _, err = deepgrpo("tiny.toml", *HELD_OUT)
    assert (code, err) == (0, "")
    return place / "runs" / "tiny"


ANSWER = {**ROWS[3], "answer": "7"}


CHANGES = {
    "fewer": (ROWS[:6], "(8 rows before, 6 rows now)"),
    "more": ([*ROWS, {"question": "9", "answer": "9"}], "(8 rows before, 9 rows now)"),
    "other order": (ROWS[::-1], "(8 rows before, 8 rows now, with other ids, prompts or answers)"),
    "another answer": ([*ROWS[:3], ANSWER, *ROWS[4:]], "(8 rows before, 8 rows now, with other ids, prompts or answers)"),
    "other ids": ([{**row, "id": f"x{i}"} for i, row in enumerate(ROWS)], "now, with other ids, prompts or answers)"),
}


def test_data_that_changed_are_noticed(deepgrpo: Any, place: Path, run: Path) -> None:
    before = files(run)
    told = "error: data: the prompts of 'data.jsonl' have changed since the checkpoint "
    for rows, says in CHANGES.values():
        write_jsonl(place / "data.jsonl", rows)
        code, _, err = deepgrpo("--resume", str(run), "--run.steps", "2")
        assert code == 1 and err.startswith(told + says) if says[0] == "(" else says in err
        assert "restore the data" in err and "--data.KEY VALUE" in err
    write_jsonl(place / "data.jsonl", ROWS)
    write_jsonl(place / "held_out.jsonl", ROWS[:2])
    code, _, err = deepgrpo("--resume", str(run), "--run.steps", "2")
    assert code == 1 and "eval.data: the prompts of 'held_out.jsonl' have changed since the checkpoint (3 rows before" in err
    assert files(run) == before
    write_jsonl(place / "held_out.jsonl", ROWS[:3])
    code, out, err = deepgrpo("--resume", str(run), "--run.steps", "2")
    assert (code, err) == (0, "") and "was changed" not in out


def test_data_that_are_changed_on_purpose_are_told(deepgrpo: Any, place: Path, run: Path) -> None:
    write_jsonl(place / "new.jsonl", ROWS[:6])
    code, out, err = deepgrpo("--resume", str(run), "--run.steps", "2", "--data.path", "new.jsonl")
    assert (code, err) == (0, "")
    assert "data was changed: the prompts of 'new.jsonl' are others than those of the checkpoint (8 rows before, 6 rows" in out
    code, out, err = deepgrpo("--resume", str(run), "--run.steps", "3")
    assert (code, err) == (0, "") and "was changed" not in out  # the new data are now those of the run


def test_what_no_prompt_depends_on_may_change(deepgrpo: Any, place: Path, run: Path) -> None:
    """The file may move and other columns may change; another limit for evaluations reads more or fewer of the same rows."""
    write_jsonl(place / "moved.jsonl", [{**row, "note": "new"} for row in ROWS])
    (place / "data.jsonl").unlink()
    code, out, err = deepgrpo("--resume", str(run), "--run.steps", "2", "--data.path", "moved.jsonl", "--eval.limit", "2")
    assert (code, err) == (0, "") and "was changed" not in out
    code, out, err = deepgrpo("--resume", str(run), "--run.steps", "3", "--run.seed", "1")
    assert (code, err) == (0, "") and "run.seed was changed: the prompts of 'moved.jsonl' come in another order" in out


# ---------------------------------------------------------------- half a surrogate pair in sampled text


@pytest.fixture
def broken_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that decodes bytes which are no text as Python does with `surrogateescape`."""
    monkeypatch.setattr(PreTrainedTokenizerBase, "decode", lambda self, tokens, **options: "####\ud800\udcff \u2028 é")


def test_sampled_text_that_no_file_takes(deepgrpo: Any, place: Path, broken_decoder: None) -> None:
    code, _, err = deepgrpo("tiny.toml", *HELD_OUT, "--eval.samples", "1")
    assert (code, err) == (0, "")
    run = place / "runs" / "tiny"
    (tree, _) = load_trees(run / "trees" / "step-000001.jsonl.gz")
    assert tree.nodes[0].text == "####\\ud800\\udcff \u2028 é"
    lines = (run / "eval" / "step-000001.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["greedy_text"] for line in lines] == ["####\\ud800\\udcff \u2028 é"] * 3


def test_a_note_that_no_file_takes_and_a_draw_by_such_a_name(tmp_path: Path) -> None:
    """The name of a strategy's signal, or a message of a user's function."""
    with RunLog(tmp_path, total_steps=1, console=Console(file=io.StringIO())) as log:
        log.note("half \ud800 a pair")
    assert "half \\ud800 a pair\n" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert rng.key("a\ud800") != rng.key("a\ud801")


def test_eval_writes_what_it_has_computed(place: Path, model: str, broken_decoder: None) -> None:
    """The name of a data set comes from the command line, and may hold a byte that is not UTF-8."""
    options = EvalOptions(
        model, data=("n\udcff=held_out.jsonl",), max_new_tokens=4, device="cpu", json="out.json", rows="rows.jsonl"
    )
    assert evaluate_model(options, Console(file=io.StringIO())) == 0
    found = json.loads((place / "out.json").read_text(encoding="utf-8"))
    assert found["sets"]["n\\udcff"]["metrics"]["eval/prompts"] == 3
    rows = (place / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rows[0])["greedy_text"] == "####\\ud800\\udcff \u2028 é"


# ---------------------------------------------------------------- eval


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"], ids=["plain", "byte order mark", "empty line"])
def test_eval_reads_a_byte_order_mark(place: Path, model: str, mark: bytes) -> None:
    """The columns are recognised by their names, in the first row."""
    (place / "bom.jsonl").write_bytes(mark + b'{"problem": "1 + 1?", "final_answer": "2"}\n')
    shown = io.StringIO()
    options = EvalOptions(model, data=("bom.jsonl",), max_new_tokens=4, device="cpu")
    assert evaluate_model(options, Console(file=shown)) == 0
    assert "questions" in shown.getvalue()


def test_eval_reads_all_data_before_it_samples(place: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the last data set does not cost the figures of the first."""
    monkeypatch.setattr("deepgrpo.engines.embedded.engine.EmbeddedEngine.sample", lambda *_: pytest.fail("it sampled"))
    write_jsonl(place / "bad.jsonl", [{"question": "1", "answer": True}])
    with pytest.raises(DataError, match=r"^bad: bad\.jsonl, line 1: the answer in column 'answer' is a bool"):
        evaluate_model(EvalOptions(model, data=("held_out.jsonl", "bad.jsonl"), device="cpu"), Console(file=io.StringIO()))


@pytest.mark.parametrize("temperature", [float("nan"), float("inf")])
def test_a_temperature_that_is_no_number_ends_before_any_model_is_loaded(temperature: float) -> None:
    with pytest.raises(ConfigError, match="--temperature is"):
        evaluate_model(EvalOptions("owner/absent", data=("amc",), temperature=temperature))
