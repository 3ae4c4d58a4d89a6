"""Runs that ended too early, or go on from an older checkpoint: the result is that of the run that never stopped."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import damage
from deepgrpo import cli
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.lock import hold
from deepgrpo.train import loop, setup, warmstart

TIMED = ("time/", "ledger/seconds_", "tokens_per_s")


class Killed(BaseException):
    """The end of the process: nothing that handles errors runs."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damage.build(tmp_path_factory.mktemp("built"))


LATE = ("--checkpoint.every", "2", "--checkpoint.keep_best", "false", "--warmstart.steps", "20", "--eval.limit", "2")
"""The first checkpoint is due at the end, after step 2."""


@pytest.fixture(scope="module")
def late(built: Path) -> Path:
    with contextlib.chdir(built.parent.parent):
        assert call("train", "recipe.toml", *LATE, "--run.name", "late")[0] == 0
    return built.parent / "late"


@pytest.fixture
def run(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A copy of the run of two steps, `runs/run`, in the working directory."""
    shutil.copytree(built.parent.parent, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return RunDir(Path("runs/run"))


def call(*arguments: str) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = cli.main(list(arguments))
    return code, out.getvalue()


def trace(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in lines]


def contents(path: Path) -> set[str]:
    return {each.relative_to(path).as_posix() for each in path.rglob("*") if each.name != "log.txt"}


def assert_same(a: Path, b: Path) -> None:
    """Files, figures, weights and moments, the last two bit by bit."""
    assert contents(a) == contents(b) and trace(a) == trace(b)
    for file in a.rglob("*.safetensors"):
        mine, other = load_file(file), load_file(b / file.relative_to(a))
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine), file


@contextlib.contextmanager
def killed_in(owner: Any, name: str, number: int) -> Iterator[None]:
    """The process ends at the beginning of this call."""
    original, calls = getattr(owner, name), 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise Killed
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wrapped)
        with pytest.raises(Killed), contextlib.redirect_stdout(io.StringIO()):
            yield


# ---------------------------------------------------------------- before the first checkpoint


@pytest.mark.parametrize(
    ("owner", "name", "number", "says"),
    [
        (setup, "build_policy", 1, "begins anew with its warm start"),
        (warmstart, "imitation_gradient", 5, "begins anew with its warm start"),
        (loop, "evaluate_run", 1, "begins with the weights of its warm start"),
        (loop, "train_step", 2, "begins with the weights of its warm start"),
        (loop, "_save", 1, "begins with the weights of its warm start"),
    ],
    ids=["loading", "warm start", "evaluation", "second step", "first save"],
)
def test_a_run_killed_before_its_first_checkpoint_is_resumed(
    late: Path, run: RunDir, owner: Any, name: str, number: int, says: str
) -> None:
    shutil.rmtree(run.path)
    with killed_in(owner, name, number):
        cli.main(["train", "recipe.toml", *LATE])
    if name == "_save":
        (run.checkpoints / ".tmp-step-000002" / "model").mkdir(parents=True)
    code, said = call("train", "--resume", "runs/run")
    assert code == 0 and f"no checkpoint yet: the run {says}" in said
    assert_same(late, run.path)


def test_checkpoints_that_were_deleted_are_missed(run: RunDir) -> None:
    """The run had reached step 2 with a checkpoint at each: it does not begin again by itself, but if asked to."""
    before = trace(run.path)
    shutil.rmtree(run.checkpoints)
    code, said = call("train", "--resume", "runs/run")
    assert code == 1 and "holds no checkpoint, although its metrics reach step 2 and the first was due at step 1" in said
    assert trace(run.path) == before
    code, said = call("train", "--resume", "runs/run", "--step", "0")
    assert code == 0 and "begins with the weights of its warm start" in said and trace(run.path) == before


# ---------------------------------------------------------------- an older checkpoint


def test_an_older_checkpoint_by_its_step(run: RunDir, built: Path) -> None:
    """What came later is cut back before the next step, and the run ends as it had; other steps are refused by name."""
    code, said = call("train", "--resume", "runs/run", "--step", "5")
    assert code == 1 and "--step 5: runs/run has no checkpoint of that step; it has 1, 2, and 0 begins again" in said
    with killed_in(loop, "train_step", 1):
        cli.main(["train", "--resume", "runs/run", "--step", "1"])
    names = {each.name for each in run.path.rglob("*step-*")}
    assert names == {"step-000000.jsonl", "step-000001.jsonl", "step-000001.jsonl.gz", "step-000001"}
    assert [line["step"] for line in trace(run.path)] == [0, 1]
    assert call("train", "--resume", "runs/run")[0] == 0
    run.lock.unlink(missing_ok=True)
    assert_same(built, run.path)


def test_step_needs_a_run(run: RunDir) -> None:
    for arguments in (("recipe.toml", "--step", "1"), ("--resume", "runs/run", "--step", "-1")):
        code, said = call("train", *arguments)
        assert code == 2 and "it names a checkpoint of the run to resume, so it needs --resume RUN_DIR" in said


# ---------------------------------------------------------------- the start model


def test_a_missing_or_changed_start_model_is_an_error(run: RunDir) -> None:
    """It is the reference of the KL term; without the term it is not needed. It was replaced by random weights before."""
    more = ("train", "--resume", "runs/run", "--run.steps", "3")
    before = contents(run.path)
    damage._flip(run.start / "model.safetensors")
    code, said = call(*more)
    assert code == 1 and "start cannot be read: model.safetensors has changed since it was written" in said
    shutil.rmtree(run.start)
    code, said = call(*more)
    assert code == 1 and "runs/run/start cannot be read: it is missing; the KL term (loss.beta > 0)" in said
    assert contents(run.path) == {name for name in before if not name.startswith("start")}
    code, said = call(*more, "--warmstart", "none")
    assert code == 1 and "is not the one from which the run started, which is the reference of the KL term" in said
    assert call(*more, "--loss.beta", "0")[0] == 0


def test_another_seed_or_model_for_the_reference_is_an_error(run: RunDir) -> None:
    """A scratch model has its start weights from run.seed: another seed would be another reference."""
    shutil.rmtree(run.path)
    plain = ["--warmstart", "none", "--run.steps", "1"]
    assert call("train", "recipe.toml", *plain)[0] == 0
    code, said = call("train", "--resume", "runs/run", "--run.steps", "2", "--run.seed", "5")
    assert code == 1 and "set [model], [warmstart] and run.seed as they were" in said
    assert call("train", "--resume", "runs/run", "--run.steps", "2")[0] == 0


# ---------------------------------------------------------------- one process at a time


def test_a_directory_in_use_is_refused_and_read_all_the_same(run: RunDir) -> None:
    before = contents(run.path)
    with hold(run):
        for arguments in (("--resume", "runs/run"), ("recipe.toml",)):
            code, said = call("train", *arguments)
            assert code == 2 and said.startswith("error: run.name: ") and "runs/run is in use by this process" in said
        assert call("report", "runs/run")[0] == 0 and call("inspect", "runs/run")[0] == 0
    assert contents(run.path) - {"report.html"} == before


def test_a_refused_run_leaves_no_directory(run: RunDir) -> None:
    code, said = call("train", "recipe.toml", "--run.name", "a/b", "--sampling.max_total_tokens", "5000")
    assert code == 1 and "the model's context is 96" in said and not Path("runs/a").exists()


# ---------------------------------------------------------------- what changed since it was written


def test_what_has_changed_is_not_resumed(run: RunDir) -> None:
    """Foreign weights of the same shapes, foreign moments, another step's files: each names the checkpoint before."""
    for name in ("weights of another run", "moments of another run", "step 1 as step 2"):
        shutil.copytree(run.path, "runs/copy")
        damage.LAYOUT[name](Path("runs/copy"))
        code, said = call("train", "--resume", "runs/copy", "--run.steps", "3")
        assert code == 1 and "continue from an earlier one with: deepgrpo train --resume runs/copy --step 1" in said, said
        assert (call("eval", "runs/copy", "--limit", "2")[0] == 1) == (name != "moments of another run")
        if name == "step 1 as step 2":
            assert call("train", "--resume", "runs/copy", "--step", "1")[0] == 0
        shutil.rmtree("runs/copy")


def test_another_strategy_does_not_take_over_the_state(run: RunDir) -> None:
    """`deep` after `root` would miss its window of pivots."""
    root = ["--explore.type", "root", "--explore.num_rollouts", "4", "--run.name", "root", "--run.steps", "1"]
    assert call("train", "recipe.toml", *root)[0] == 0
    code, said = call("train", "--resume", "runs/root", "--explore", '{type = "deep", segments = {type = "tokens", size = 3}}')
    assert code == 1 and "its state does not fit the recipe" in said and "was explore.type changed?" in said


def test_a_directory_that_is_removed_during_the_run(run: RunDir) -> None:
    original = loop.train_step

    def train_step(*arguments: Any) -> Any:
        shutil.rmtree(run.path)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", train_step)
        code, said = call("train", "--resume", "runs/run", "--run.steps", "3")
    assert code == 1 and "was removed or moved while the run was going" in said and not run.path.exists()


# ---------------------------------------------------------------- standard output


def test_a_full_standard_output_is_not_the_fault_of_the_run(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """`> /dev/full`: a run goes on into its log; a command that only prints ends in a sentence."""
    for arguments, code, says in (
        (("train", "--resume", "runs/run", "--run.steps", "3"), 0, "warning: standard output cannot be written: No space left"),
        (("inspect", "runs/run"), 1, "error: standard output cannot be written: No space left on device; free some space"),
    ):
        with open("/dev/full", "w") as full, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", full)
            assert cli.main(list(arguments)) == code
        assert says in capsys.readouterr().err
    assert trace(run.path)[-1]["step"] == 3 and "step 3/3" in run.log.read_text()
