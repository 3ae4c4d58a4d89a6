"""`deepgrpo compare` as a user meets it: a tiny experiment that is killed, stopped, finished, and looked at again."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import PATIENCE_S, Command, Starter

from deepgrpo import cli
from experiments import TRAINABLE as BASE

EXPERIMENT = """
name = "tiny"
seeds = [1, 2]
baseline = "grpo"
budget = 8_000
base = "base.toml"

[final]
limit = 12
sampled_limit = 6
samples = 4
k = [1, 4]

[curve]
target = 0.99

[arms.grpo.explore]
type = "root"
num_rollouts = 4

[arms.deep]
"""


def wait_for(there: Callable[[], bool], process: Command) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def steps_of(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else -1


def stamps(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(directory.rglob("*")) if path.is_file()}


def whole_story(place: Path, commands: Starter) -> dict[str, Any]:
    """An experiment that is killed in its second run, stopped with Ctrl-C in its third, and then finished."""
    (place / "base.toml").write_text(BASE)
    (place / "exp.toml").write_text(EXPERIMENT)
    arms = place / "runs" / "tiny" / "arms"
    seen: dict[str, Any] = {"place": place, "arms": arms}

    killed = commands.start("compare", "exp.toml", cwd=place)
    wait_for(lambda: steps_of(arms / "deep" / "seed-1") >= 3, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert (arms / "grpo" / "seed-1" / "final.json").is_file()
    seen["first run"] = stamps(arms / "grpo" / "seed-1")
    seen["saved"] = max(int(p.name[5:]) for p in (arms / "deep" / "seed-1" / "checkpoints").glob("step-*"))

    stopped = commands.start("compare", "exp.toml", cwd=place)
    wait_for(lambda: steps_of(arms / "grpo" / "seed-2") >= 1, stopped)
    os.killpg(stopped.pid, signal.SIGINT)
    seen["stopped"] = (*stopped.communicate(), stopped.returncode)

    finished = commands.start("compare", "exp.toml", "--jobs", "2", cwd=place)
    seen["finished"] = (*finished.communicate(), finished.returncode)
    return seen


@pytest.mark.slow
def test_an_experiment_killed_stopped_finished_and_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, commands: Starter
) -> None:
    # one test: with a fixture, every worker of pytest-xdist would run the whole experiment for itself
    done = whole_story(tmp_path, commands)
    it_is_finished_after_all(done)
    finished_runs_are_kept_and_a_killed_one_goes_on(done)
    ctrl_c_saves_and_says_how_to_go_on(done)
    the_arms_of_a_seed_begin_with_the_same_weights(done)
    the_figures_are_those_of_the_runs(done)
    monkeypatch.chdir(tmp_path)
    once_more_only_looks(done, capsys)
    runs_of_another_recipe_are_not_mixed_in(capsys)
    a_second_one_waits_for_the_first(capsys)


def it_is_finished_after_all(done: dict[str, Any]) -> None:
    out, err, code = done["finished"]
    assert (code, err) == (0, ""), out
    assert not set("\r\x1b") & set(out)
    assert "Untouched questions after 8k sampled tokens, %" in out
    assert "Difference to grpo on untouched questions, points" in out
    assert out.rstrip().splitlines()[-1].startswith("runs/tiny: comparison.json, figures.json, comparison.md")
    assert not list((done["place"] / "runs").rglob(".tmp*"))
    for run in ("grpo/seed-1", "deep/seed-1", "grpo/seed-2", "deep/seed-2"):
        lines = lines_of(done["arms"] / run)
        assert [line["step"] for line in lines] == list(range(len(lines)))
        # it stops at the first step that reaches the budget
        assert lines[-1]["ledger/sampled_tokens"] >= 8000 > lines[-2]["ledger/sampled_tokens"]


def finished_runs_are_kept_and_a_killed_one_goes_on(done: dict[str, Any]) -> None:
    assert stamps(done["arms"] / "grpo" / "seed-1") == done["first run"]
    log = (done["place"] / "runs" / "tiny" / "jobs" / "deep-seed-1.log").read_text()
    # its second process began behind the checkpoint
    second = log[log.rindex("trainable parameters") :]
    first_step = re.search(r"^step +(\d+)/400", second, re.MULTILINE)
    assert first_step and int(first_step[1]) == done["saved"] + 1 > 1


def ctrl_c_saves_and_says_how_to_go_on(done: dict[str, Any]) -> None:
    out, err, code = done["stopped"]
    assert (code, err) == (130, "interrupted\n")
    assert re.search(r"^stopped; [23] of 4 runs are finished, the others were saved; continue", out, re.MULTILINE)
    assert "tiny: 2 arms × 2 seeds, 8,000 sampled tokens each; 1 of 4 runs are finished already\n" in out
    assert re.search(r"^deep-seed-1 continues at [\d,]+ tokens$", out, re.MULTILINE)


def the_arms_of_a_seed_begin_with_the_same_weights(done: dict[str, Any]) -> None:
    root = done["place"] / "runs" / "tiny"
    weights = {
        seed: (root / "warmstart" / f"seed-{seed}" / "start" / "model.safetensors").read_bytes() for seed in (1, 2)
    }
    assert weights[1] != weights[2]
    for seed in (1, 2):
        first = []
        for arm in ("grpo", "deep"):
            directory = done["arms"] / arm / f"seed-{seed}"
            assert (directory / "start" / "model.safetensors").read_bytes() == weights[seed]
            line = lines_of(directory)[0]
            first.append({key: value for key, value in line.items() if key.startswith("eval/")})
            first[-1]["answers"] = (directory / "eval" / "step-000000.jsonl").read_text()
        assert first[0] == first[1]


def the_figures_are_those_of_the_runs(done: dict[str, Any]) -> None:
    result = json.loads((done["place"] / "runs" / "tiny" / "comparison.json").read_text())
    for arm in ("grpo", "deep"):
        for seed in (1, 2):
            directory = done["arms"] / arm / f"seed-{seed}"
            figures, last = result["arms"][arm]["runs"][str(seed)], lines_of(directory)[-1]
            for key in ("sampled_tokens", "optimizer_steps", "trained_tokens", "verifier_calls"):
                assert figures[f"spent/{key}"] == last[f"ledger/{key}"]
            final = json.loads((directory / "final.json").read_text())
            assert figures["final/greedy"] == final["metrics"]["eval/greedy"]
            assert (final["questions"], final["sampled_questions"], final["step"]) == (12, 6, last["step"])
            assert set(figures) >= {"final/pass@1", "final/pass@4", "train/entropy", "train/length", "train/grad_norm"}
            # 6 questions of 4 samples: sampled accuracy is pass@1
            assert figures["final/sampled"] == pytest.approx(figures["final/pass@1"])
    found = result["arms"]["deep"]["differences"]["final/greedy"]
    each = [
        result["arms"]["deep"]["runs"][s]["final/greedy"] - result["arms"]["grpo"]["runs"][s]["final/greedy"] for s in "12"
    ]
    assert (found["low"], found["high"]) == pytest.approx((min(each), max(each)))
    assert result["optimizer_steps_compared"] == min(
        figures["spent/optimizer_steps"] for arm in result["arms"].values() for figures in arm["runs"].values()
    )
    assert result["jobs"] == 2 and "processor" in result["machine"]


def once_more_only_looks(done: dict[str, Any], capsys: Any) -> None:
    before = stamps(done["arms"])
    assert cli.main(["compare", "exp.toml"]) == 0
    assert "4 of 4 runs are finished already" in capsys.readouterr().out
    assert stamps(done["arms"]) == before
    # from what the runs took: 4 runs of nothing left
    assert cli.main(["compare", "exp.toml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "2 finished runs" in out and "0 runs, 0 sampled tokens, about 0 minutes with --jobs 1\n" in out
    assert stamps(done["arms"]) == before


def runs_of_another_recipe_are_not_mixed_in(capsys: Any) -> None:
    Path("other.toml").write_text(EXPERIMENT + "explore.gamma = 1.0\n")
    assert cli.main(["compare", "other.toml"]) == 2
    said = capsys.readouterr().err
    assert "runs/tiny/arms/deep/seed-1 was run with explore.gamma = 2.0, and the experiment now says 1.0" in said
    assert "delete that directory to run it anew, or give the experiment another name" in said
    # a smaller budget: the runs went beyond it
    Path("other.toml").write_text(EXPERIMENT.replace("8_000", "4_000"))
    assert cli.main(["compare", "other.toml"]) == 2
    assert "run.max_sampled_tokens = 8000, and the experiment now says 4000" in capsys.readouterr().err


def a_second_one_waits_for_the_first(capsys: Any) -> None:
    import fcntl

    with Path("runs/tiny/.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cli.main(["compare", "exp.toml"]) == 2
    assert "runs/tiny is in use by another `deepgrpo compare`" in capsys.readouterr().err


@pytest.mark.slow
def test_what_fails_or_falls_short_is_named(tmp_path: Path, commands: Starter) -> None:
    """An arm crashes, another takes its last step before the budget; what is whole is shown, and the short one can go on."""
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "exp.toml").write_text(
        EXPERIMENT.replace("8_000", "1_100")
        .replace("samples = 4\nk = [1, 4]", "samples = 2\nk = []")
        .replace("[arms.deep]", "")
        # no check of a recipe looks for the function: the run itself fails
        + '[arms.crash]\nreward = {type = "user", function = "absent.py:f"}\n'
        # enough if responses were as long as they may be: 6 steps of 8 x 2 x 12 = 192 tokens
        + '[arms.short]\nrun.steps = 6\nexplore = {type = "root", num_rollouts = 2}\n'
    )
    process = commands.start("compare", "exp.toml", "--jobs", "2", cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, err) == (1, ""), out
    said = " ".join(out.split())
    log = r"\(full output: runs/tiny/jobs/crash-seed-1\.log\)"
    assert re.search(rf"warning: crash-seed-1 failed: error: .*absent\.py.* {log}", said)
    over = r"as its run\.steps = 6 steps were over; about \d+ are needed: raise run\.steps"
    assert re.search(rf"warning: short-seed-2 ended at \d+ of 1,100 sampled tokens, {over}", said)
    assert "not run for that reason: crash-seed-1-final, short-seed-1-final, crash-seed-2-final, short-seed-2-final" in said
    assert "not in these figures, as they are not finished: crash-seed-1, short-seed-1, crash-seed-2, short-seed-2" in said
    result = json.loads((tmp_path / "runs" / "tiny" / "comparison.json").read_text())
    assert [len(result["arms"][arm]["runs"]) for arm in ("grpo", "crash", "short")] == [2, 0, 0]

    # with more steps the short ones go on, and reach it
    text = (tmp_path / "exp.toml").read_text()
    kept = text[: text.index("[arms.crash]")] + text[text.index("[arms.short]") :]
    (tmp_path / "exp.toml").write_text(kept.replace("run.steps = 6", "run.steps = 60"))
    process = commands.start("compare", "exp.toml", cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, ""), out
    assert re.search(r"^short-seed-1 continues at \d+ tokens$", out, re.MULTILINE)


@pytest.mark.slow
def test_a_dry_run_measures_and_leaves_nothing(tmp_path: Path, commands: Starter) -> None:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "exp.toml").write_text(EXPERIMENT)
    done = commands.run("compare", "exp.toml", "--dry-run", "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 0
    assert all(line.startswith("trials ") for line in done.stderr.splitlines())  # of a slow machine's progress
    out = " ".join(done.stdout.split())
    assert "no finished run of grpo, deep: measuring two small steps of each" in out and "two small steps" in out
    assert re.search(r"4 runs, 32,000 sampled tokens, about \d+ minutes with --jobs 2, and 2 warm starts before them", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.toml", "exp.toml"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("seeds = [1, 2]", "seeds = [1]"), "exp.toml: seeds is [1], but paired intervals need at least two seeds"),
        (("[arms.deep]", "[arms.deep]\nexplore.gama = 3"), "exp.toml, arm 'deep': unknown key 'explore.gama' (value 3)"),
        (("budget = 8_000", "budget = 800_000"), "the arm 'grpo' cannot reach the budget of 800,000 sampled tokens"),
        (("limit = 12", "limit = 400"), "final.limit is 400, and 8 questions are used during training"),
        (('base = "base.toml"', 'base = "nowhere.toml"'), "recipe 'nowhere.toml' does not exist"),
    ],
)
def test_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, change: tuple[str, str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "exp.toml").write_text(EXPERIMENT.replace(*change))
    assert cli.main(["compare", "exp.toml"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {says}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.toml", "exp.toml"]  # nothing was begun


def test_no_jobs_and_no_file(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "exp.toml").write_text(EXPERIMENT)
    assert cli.main(["compare", str(tmp_path / "exp.toml"), "--jobs", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: --jobs is 0")
    assert cli.main(["compare", "methodes"]) == 2
    assert "did you mean 'methods'?" in capsys.readouterr().err
