"""A run directory that is moved, continued from anywhere, and looked at by `deepgrpo doctor`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepgrpo.cli import main
from deepgrpo.config import load_recipe
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.lock import hold
from deepgrpo.runs.moved import load_run_recipe
from tiny import save_model, write_jsonl

RECIPE = """
[run]
steps = 3
prompts_per_step = 2
device = "cpu"
[model]
type = "pretrained"
path = "models/tiny"
[data]
type = "jsonl"
path = "data/sums-*.jsonl"
[eval]
every = 3
[eval.data]
type = "jsonl"
path = "data/sums-1.jsonl"
[reward]
type = "user"
function = "mine.py:odd"
truncated_value = "none"
[sampling]
max_new_tokens = 6
[explore]
type = "root"
num_rollouts = 3
[loss]
beta = 0.0
[optim]
lr = 1e-2
[checkpoint]
every = 1
keep_last = 3
[log]
trees_every = 1
"""
REWARD = """
def odd(completions, answer, **columns):
    return [float(sum(not c.isascii() for c in text) % 2) for text in completions]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a finished run whose recipe names all files relative to it."""
    project = tmp_path_factory.mktemp("moved") / "project"
    (project / "data").mkdir(parents=True)
    save_model(project / "models" / "tiny", "qwen2")
    for part in range(2):
        rows = [{"question": f"{i} + {part}?", "answer": str(i + part)} for i in range(4)]
        write_jsonl(project / "data" / f"sums-{part}.jsonl", rows)
    (project / "mine.py").write_text(REWARD)
    (project / "recipe.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        assert main(["train", "recipe.toml"]) == 0
    return project


def outcome(run: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "ledger/seconds_", "tokens_per_s")
    figures = [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]
    return figures, load_file(run / "checkpoints" / "step-000003" / "model" / "model.safetensors")


def test_a_run_goes_on_bit_by_bit_wherever_it_is(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, weights = outcome(project / "runs" / "run")
    assert len(figures) == 4 and figures[-1]["ledger/optimizer_steps"] > 0
    first, second, alone, elsewhere = (tmp_path / name for name in ("first", "second", "alone", "elsewhere"))
    # the project is moved: no path of the recipe exists where it was, and another file has the name of the data here
    shutil.copytree(project, first)
    place = json.loads((first / "runs" / "run" / "place.json").read_text())
    for name, began in (("working_directory", tmp_path / "gone"), ("run", tmp_path / "gone" / "runs" / "run")):
        place[name] = str(began)
    (first / "runs" / "run" / "place.json").write_text(json.dumps(place))
    (elsewhere / "data").mkdir(parents=True)
    write_jsonl(elsewhere / "data" / "sums-0.jsonl", [{"question": "other?", "answer": "0"}])
    # the run is moved alone: its data are where they were
    shutil.copytree(project, second)
    place = {"working_directory": str(second), "run": str(second / "runs" / "run")}
    (second / "runs" / "run" / "place.json").write_text(json.dumps(place))
    shutil.move(second / "runs" / "run", alone)
    monkeypatch.chdir(elsewhere)
    for run, root in ((first / "runs" / "run", first), (alone, second)):
        assert main(["train", "--resume", str(run), "--step", "2"]) == 0
        again, same = outcome(run)
        assert again == figures
        assert all(torch.equal(same[key], weights[key]) for key in weights)
        config = load_recipe(run / "config.toml")
        assert config.data.path == str(root / "data" / "sums-*.jsonl")  # type: ignore[union-attr]
        assert config.reward.function == str(root / "mine.py") + ":odd"  # type: ignore[union-attr]


def test_paths_begin_where_the_run_was_started(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(project / "runs" / "run")
    monkeypatch.chdir(project)
    assert load_run_recipe(run) == load_recipe(run.config)  # nothing to change
    monkeypatch.chdir(tmp_path)
    config: Any = load_run_recipe(run, [("data.path", "mine.jsonl")])
    assert config.model.path == str(project / "models" / "tiny") and config.model.tokenizer is None
    assert config.eval.data.path == str(project / "data" / "sums-1.jsonl")
    assert config.data.path == "mine.jsonl"  # a path of the command line begins here
    assert config.run.dir == "runs"


def doctor(run: Path, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    capsys.readouterr()
    assert main(["doctor", str(run)]) == code
    return capsys.readouterr().out


def test_the_doctor_looks_at_a_run(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(project / "runs" / "run", run)
    monkeypatch.chdir(tmp_path)
    text = doctor(run, capsys)
    for said in (
        "ok   lock        no process trains here", "ok   checkpoint  step 3: all files are as they were written",
        "ok   metrics     4 lines, up to step 3", "ok   trees       6 trees of 3 steps can be read",
        "ok   origin      a resume begins at step 3", "note moved       data.path = 'data/sums-*.jsonl' is ",
        " free\n",
        "next: the run is finished; look at it: deepgrpo report run",
    ):  # fmt: skip
        assert said in text, text
    assert "those to come" not in text  # of a finished run none come
    with hold(RunDir(run)):
        text = doctor(run, capsys)
        assert "note lock        run is in use by this process" in text and "next: wait for it to end" in text
    shutil.rmtree(run / "checkpoints" / "step-000003")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "main/re')
    (run / "checkpoints" / ".tmp-step-000004").mkdir()
    text = doctor(run, capsys)
    assert "1 cannot be read or are repeated" in text and "note left over" in text
    assert "a resume begins at step 2" in text


def test_the_doctor_finds_damage(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(project / "runs" / "run", run)
    weights = run / "checkpoints" / "step-000003" / "model" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    (run / "trees" / "step-000002.jsonl.gz").write_bytes(b"no gzip")
    text = doctor(run, capsys, code=1)
    assert "bad  checkpoint  the checkpoint " in text and "model/model.safetensors has changed since it was written" in text
    assert "--step 2" in text  # the remedy
    assert "bad  origin      a resume stops at the damaged checkpoint of step 3, unless --step names another" in text
    assert "ok   checkpoint  step 2" in text and "bad  trees " in text and "4 trees of 3 steps" in text
    (run / "config.toml").write_text("[run]\nnmae = 1\n")
    text = doctor(run, capsys, code=1)
    assert "bad  recipe " in text and "nmae" in text and "see the lines marked bad" in text
