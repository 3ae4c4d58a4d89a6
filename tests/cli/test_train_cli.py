"""`deepgrpo train` as a user meets it: real processes, real signals, and what they leave behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE_S, Command, Starter

from deepgrpo import cli
from deepgrpo.config import load_recipe
from deepgrpo.train.loop import train
from recipes import CHAIN, HELD_OUT, recipe_text


def recipe(reward: str) -> str:
    return recipe_text(
        CHAIN, run={"steps": 8}, model={"hidden_size": 32, "intermediate_size": 64}, reward={"type": reward},
        checkpoint={"every": 2}, eval={"every": 4, "limit": 8, "data": HELD_OUT},
    )  # fmt: skip



def lines_of(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trace(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    timed = ("time/", "ledger/seconds_", "tokens_per_s")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines_of(directory)]


def wait_for_step(directory: Path, step: int, process: Command) -> None:
    deadline = time.monotonic() + PATIENCE_S
    path = directory / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") <= step:  # step 0 has a line too
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def whole_run(directory: Path, reward: str) -> Path:
    """A run that nobody disturbs, in this process."""
    (directory / "tiny.toml").write_text(recipe(reward))
    return train(load_recipe(directory / "tiny.toml", [("run.dir", str(directory / "runs")), ("run.name", "whole")]))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, commands: Starter) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A directory with a recipe and a run that was started from the command line, and what that printed."""
    place = tmp_path_factory.mktemp("done")
    (place / "tiny.toml").write_text(recipe("task"))
    return place, commands.run("train", "tiny.toml", "--run.steps", "3", cwd=place)


def test_a_recipe_trains(done: Any) -> None:
    place, process = done
    assert (process.returncode, process.stderr) == (0, "")
    assert [line["step"] for line in lines_of(place / "runs" / "tiny")] == [0, 1, 2, 3]
    # a line a step, the accuracy before and after, and where the run is
    assert len(re.findall(r"^step \d/3  reward ", process.stdout, re.MULTILINE)) == 3
    assert re.search(r"^greedy accuracy on 8 held-out questions: .* before, .* after 3 steps", process.stdout, re.MULTILINE)
    assert process.stdout.endswith("run directory: runs/tiny\n")
    assert load_recipe(place / "runs" / "tiny" / "config.toml").run.steps == 3


def test_into_a_pipe_goes_plain_text(done: Any) -> None:
    _, process = done
    assert not set("\r\x1b") & set(process.stdout + process.stderr)


def test_a_second_run_into_the_same_directory_is_refused(
    done: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, _ = done
    before = (place / "runs" / "tiny" / "metrics.jsonl").read_bytes()
    monkeypatch.chdir(place)
    assert cli.main(["train", "tiny.toml"]) == 2
    assert capsys.readouterr() == (
        "",
        "error: run.name: the directory runs/tiny already holds a run; continue it with: deepgrpo train --resume runs/tiny, "
        "choose another with --run.name NAME, or delete it with --run.overwrite true\n",
    )
    assert (place / "runs" / "tiny" / "metrics.jsonl").read_bytes() == before


def test_the_result_can_be_evaluated(done: Any, commands: Starter) -> None:
    place, _ = done
    process = commands.run("eval", "runs/tiny", "--json", "figures.json", "--device", "cpu", cwd=place)
    assert process.returncode == 0, process.stderr
    assert "runs/tiny/checkpoints/step-000003/model on cpu" in process.stdout
    (figures,) = json.loads((place / "figures.json").read_text())["sets"].values()
    # the run's own questions: its last evaluation again
    last = lines_of(place / "runs" / "tiny")[-1]
    assert figures["metrics"]["eval/greedy"] == last["eval/greedy"] and figures["metrics"]["eval/prompts"] == 8
    assert not set("\r\x1b") & set(process.stdout + process.stderr)


def test_a_dry_run_trains_nothing(tmp_path: Path, commands: Starter) -> None:
    (tmp_path / "tiny.toml").write_text(recipe("task"))
    process = commands.run("train", "tiny.toml", "--dry-run", cwd=tmp_path)
    assert (process.returncode, process.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]
    text = process.stdout
    assert "chain_length = 1" in text and "dry run: nothing was trained" in text
    assert re.search(r"^prompt 'synthetic-train-\d+', 4 tokens\n\d[-+*]\d:\n", text, re.MULTILINE)
    # 8 prompts x 4 rollouts x 12 tokens, and 4 branches for each of the 32 rollouts
    assert re.search(r"sampled tokens, main stream\W+384\b", text)
    assert re.search(r"sampled tokens, branch stream\W+1,536\b", text)
    assert re.search(r"memory, kept rollouts, at most\W+0\.00 GiB", text)
    assert "memory, weights of the engine" not in text  # it samples with the policy's own
    assert re.search(r"memory, total\W+0\.\d\d GiB", text)


def stopped_at(out: str) -> tuple[int, list[str]]:
    """The step that a stopped run names, and the arguments of the command that it tells."""
    found = re.search(r"^stopped after step (\d+) and saved; continue with: deepgrpo (.*)$", out, re.MULTILINE)
    assert found
    return int(found[1]), found[2].split()


def test_stopped_then_killed_then_finished(tmp_path: Path, commands: Starter) -> None:
    """SIGTERM ends a run after its step, kill -9 at once; either way it goes on as if nothing had happened."""
    whole = whole_run(tmp_path, "task")
    directory = tmp_path / "runs" / "tiny"

    process = commands.start("train", "tiny.toml", cwd=tmp_path)
    wait_for_step(directory, 1, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    step, command = stopped_at(out)
    assert 1 <= step < 6
    assert trace(directory) == trace(whole)[: step + 1]
    assert max((directory / "checkpoints").iterdir()).name == f"step-{step:06d}"

    process = commands.start(*command, cwd=tmp_path)
    wait_for_step(directory, step + 1, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    saved = max(int(path.name[-6:]) for path in (directory / "checkpoints").glob("step-*"))
    assert saved >= step

    finished = commands.run("train", "--resume", "runs/tiny", cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    first = re.search(r"^step (\d+)/8", finished.stdout, re.MULTILINE)
    assert first and int(first[1]) == saved + 1
    assert trace(directory) == trace(whole)
    assert not list(directory.rglob(".tmp*"))


def test_ctrl_c_loses_no_check_of_the_reward(tmp_path: Path, commands: Starter) -> None:
    """Ctrl-C reaches the reward's worker processes as well, and the step is finished all the same."""
    whole = whole_run(tmp_path, "math")
    process = commands.start("train", "tiny.toml", cwd=tmp_path)
    directory = tmp_path / "runs" / "tiny"
    wait_for_step(directory, 2, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert out.count("finishing this step; Ctrl-C again stops at once\n") == 1
    step, command = stopped_at(out)
    assert trace(directory) == trace(whole)[: step + 1] and trace(whole)[step]["reward/problems"] == 0
    finished = commands.run(*command, cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert trace(directory) == trace(whole)


def test_ctrl_c_in_a_pipe_loses_no_step(tmp_path: Path, commands: Starter) -> None:
    """`deepgrpo train | tee` ends the reader with the same Ctrl-C; the run saves its step all the same."""
    (tmp_path / "tiny.toml").write_text(recipe("task"))
    process = commands.start("train", "tiny.toml", "--run.steps", "500", "--checkpoint.every", "none", cwd=tmp_path)
    directory = tmp_path / "runs" / "tiny"
    wait_for_step(directory, 2, process)
    process.stdout.close()
    os.killpg(process.pid, signal.SIGINT)
    assert (process.wait(), process.stderr.read()) == (0, "")
    process.stderr.close()
    step, _ = stopped_at(re.sub(r"^.{21}", "", (directory / "log.txt").read_text(), flags=re.MULTILINE))
    assert [path.name for path in (directory / "checkpoints").iterdir()] == [f"step-{step:06d}"]


def test_ctrl_c_during_the_warm_start(tmp_path: Path, commands: Starter) -> None:
    """It acts within a step; nothing is saved, which the output and the exit code say, and nothing is in the way."""
    (tmp_path / "tiny.toml").write_text(recipe("task"))
    process = commands.start("train", "tiny.toml", "--warmstart.steps", "100000", cwd=tmp_path)
    log = tmp_path / "runs" / "tiny" / "log.txt"
    deadline = time.monotonic() + PATIENCE_S
    while not log.exists() or "warm start" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    try:
        out, err = process.communicate()
    finally:
        process.kill()  # it would go on for long
    assert (process.returncode, err) == (130, "interrupted\n")
    assert "finishing this step; Ctrl-C again stops at once\n" in out
    assert re.search(r"^stopped after step \d+ of the warm start, which was not finished: nothing was saved", out, re.MULTILINE)
    again = commands.run("train", "tiny.toml", "--run.steps", "1", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")


def test_a_directory_without_a_recipe_cannot_be_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert f"error: --resume '{tmp_path}' has no config.toml; name the directory of an earlier run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
