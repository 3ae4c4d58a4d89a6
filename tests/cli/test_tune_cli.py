"""An experiment with a tuning stage, its jobs run in this process: trials, choice, fresh runs, and once more."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepgrpo import cli
from deepgrpo.lab.compare import command, final_eval
from deepgrpo.lab.compare.jobs import Job, Jobs
from experiments import TRAINABLE

BASE = TRAINABLE.replace("\nsteps = 40\n", "\nsteps = 2\n").replace("every = 2", "every = 50").replace("limit = 8", "limit = 2")
EXPERIMENT = """
name = "tuned"
seeds = [1, 2]
baseline = "grpo"
budget = 1_000
base = "base.toml"
[common]
eval.every = "none"
eval.every_tokens = 250
[tune]
grid = { optim.lr = [1e-4, 1e-2] }
seeds = [11]
budget = 600
[final]
limit = 2
sampled_limit = 1
samples = 2
k = [2]
[arms.grpo.explore]
type = "root"
num_rollouts = 4
[arms.deep]
"""


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs run in this process, one after the other; their names."""
    names: list[str] = []

    def launch(self: Jobs, job: Job) -> Any:
        names.append(job.name)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            if job.command[0] == "deepgrpo.cli":
                code = cli.main(list(job.command[1:]))
            else:
                assert job.command[0] == final_eval.__name__
                code = final_eval._main(*job.command[1:])
        return SimpleNamespace(poll=lambda: code, returncode=code)

    monkeypatch.setattr(Jobs, "_launch", launch)
    monkeypatch.setattr(command, "can_draw", lambda: False)
    monkeypatch.setattr(importlib.import_module("deepgrpo.lab.compare.jobs"), "POLL_S", 0.0)
    return names


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(each) for each in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_an_experiment_that_tunes_first(tmp_path: Path, ran: list[str], capsys: Any) -> None:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "exp.toml").write_text(EXPERIMENT)
    assert cli.main(["compare", "exp.toml"]) == 0
    out = capsys.readouterr().out
    root = Path("runs/tuned")
    trials = [f"{arm}-lr={lr}-seed-11" for arm in ("grpo", "deep") for lr in ("0.0001", "0.01")]
    fresh = [
        name for seed in (1, 2) for name in
        (f"_warmstart-seed-{seed}", *(f"{arm}-seed-{seed}{end}" for arm in ("grpo", "deep") for end in ("", "-final")))
    ]  # fmt: skip
    assert ran == ["_warmstart-seed-11", *trials, *fresh]

    # the recorded figures are those of the runs, the choice is theirs, and the fresh runs have it
    record = json.loads((root / "tune.json").read_text())
    for arm in ("grpo", "deep"):
        means = {}
        for trial in record["arms"][arm]["trials"]:
            curve = [
                (each["ledger/sampled_tokens"], each["eval/greedy"])
                for each in lines_of(root / "tune" / arm / trial["name"] / "seed-11") if "eval/greedy" in each
            ]  # fmt: skip
            assert curve[0][0] == 0 and curve[-1][0] >= 600
            means[trial["values"]["optim.lr"]] = trial["mean"]
        best = max(means, key=lambda lr: (means[lr], -lr))
        assert record["arms"][arm]["chosen"] == {"optim.lr": best}
        for seed in (1, 2):
            assert f"\nlr = {best}\n" in (root / "arms" / arm / f"seed-{seed}" / "config.toml").read_text()
    assert "Chosen is the trial with the highest greedy accuracy" in out and "Tuning: greedy accuracy" in out
    assert "| deep | lr=0.0001 | " in (root / "comparison.md").read_text()

    # no untouched question was used to tune; all runs are evaluated at the first step at or beyond each mark
    assert not list((root / "tune").rglob("final.json"))
    for run in [*(root / "tune").glob("*/*/seed-*"), *(root / "arms").glob("*/seed-*")]:
        lines, before = lines_of(run), 0
        for each in lines[1:]:
            tokens = each["ledger/sampled_tokens"]
            assert ("eval/greedy" in each) == (tokens // 250 > before // 250 or each is lines[-1])
            before = tokens

    # once more: the choice stands even without the runs that led to it, and nothing is run
    del ran[:]
    shutil.rmtree(root / "tune" / "deep")
    assert cli.main(["compare", "exp.toml"]) == 0
    assert ran == [] and json.loads((root / "tune.json").read_text()) == record
    assert cli.main(["compare", "exp.toml", "--dry-run"]) == 0
    assert "0 runs, 0 sampled tokens, about 0 minutes with --jobs 1\n" in capsys.readouterr().out


