"""`deepgrpo report` and `inspect` through the command line: what is written, what is said, what can be wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepgrpo import cli
from saved_runs import random_run, small_tree, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return random_run(tmp_path / "runs" / "demo", steps=3, per_step=4)


def test_a_report_is_written_beside_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run)]) == 0
    said = capsys.readouterr().out
    page = run / "report.html"
    assert f"{page}: 1 run, 12 trees, " in said
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    # nothing is left aside
    inside = ["checkpoints", "config.toml", "metrics.jsonl", "report.html", "trees"]
    assert sorted(path.name for path in run.iterdir()) == inside


def test_several_runs_in_one_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = random_run(tmp_path / "other" / "demo", steps=2, per_step=3, seed=1)
    out = tmp_path / "both.html"
    assert cli.main(["report", str(run), str(other), str(run), "--out", str(out), "--title", "two & <more>"]) == 0
    assert "2 runs, 18 trees" in capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    assert "<h1>two &amp; &lt;more&gt;</h1>" in text
    assert '"name":"runs/demo"' in text and '"name":"other/demo"' in text


def test_the_cap_is_said_with_its_remedy(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run), "--max-trees", "8"]) == 0
    said = capsys.readouterr().out
    assert "note: demo: the page has 8 of 12 saved trees, those of 2 of 3 steps; --max-trees 12 takes all" in said
    assert cli.main(["report", str(run), "--max-trees", "0"]) == 0
    assert "no trees in the page, as --max-trees is 0" in capsys.readouterr().out


def test_a_report_of_a_run_without_trees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "bare", {}, last_step=5, recipe={"log": {"trees_every": None}})
    assert cli.main(["report", str(run)]) == 0
    assert "log.trees_every is not set in its recipe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["report", "nowhere"], 1, "'nowhere' does not exist"),
        (["report", "."], 1, "'.' is not a run directory"),
        (["report"], 2, "deepgrpo report needs a run directory"),
        (["report", "RUN", "--max-trees", "-1"], 2, "--max-trees is -1"),
        (["report", "RUN", "--out", "."], 2, "which is a directory; name a file"),
        (["report", "RUN", "--out", "no/such/place.html"], 2, "cannot be written: no/such does not exist; choose another"),
        (["inspect", "nowhere"], 1, "'nowhere' does not exist"),
        (["inspect", "RUN", "--step", "9"], 1, "the nearest steps with trees are 1, 2, 3"),
        (["inspect", "RUN", "--prompt", "q9"], 1, "--prompt 'q9' is not in any of the 3 saved steps"),
    ],
)
def test_what_can_be_wrong(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str],
    code: int, sentence: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(run) if argument == "RUN" else argument for argument in arguments]) == code
    assert sentence in capsys.readouterr().err


def test_a_run_before_its_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "young", {}, last_step=1)
    (run / "metrics.jsonl").write_text("")
    assert cli.main(["report", str(run)]) == 1
    assert "has no step yet" in capsys.readouterr().err


def test_inspect_walks_from_the_run_to_a_tree(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(run)]) == 0
    assert f"deepgrpo inspect {run} --step 3" in capsys.readouterr().out
    assert cli.main(["inspect", str(run), "--step", "3"]) == 0
    assert "--prompt 0" in capsys.readouterr().out
    assert cli.main(["inspect", str(run), "--step", "3", "--prompt", "q3-2"]) == 0
    assert "step 3 · prompt q3-2" in capsys.readouterr().out


def test_a_terminal_without_the_signs_still_shows_a_tree(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {1: [small_tree()]})
    done = subprocess.run(
        [sys.executable, "-m", "deepgrpo.cli", "inspect", str(run), "--prompt", "q1"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "NO_COLOR": "1"}, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "advantage +0.500" in done.stdout


def test_reports_need_no_torch(run: Path) -> None:
    code = (
        "import sys; from deepgrpo import cli; assert cli.main(sys.argv[1:]) == 0; "
        "assert not {'torch', 'transformers'} & set(sys.modules), 'loaded'"
    )
    for command in ("report", "inspect"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, str(run)], capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stderr
