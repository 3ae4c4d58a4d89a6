"""The benchmark of a busy machine: what its arms set, that it goes on where it stopped, and its tables."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import busy
from benchmarks.options import BenchOptions
from deepgrpo.errors import ConfigError, EngineError


def test_an_arm_has_its_own_settings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "9")
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    found = {arm: {name: value for name, value in busy.environment(arm).items() if name in names} for arm in busy.ARMS}
    assert found == {"ours": {}, "default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}, "one": {}}


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Arms that take no step: seconds are 2 on a quiet machine, 3 beside others, and the default's ten times as many there."""
    taken: list[tuple[str, str]] = []
    around = ["quiet"]

    @contextlib.contextmanager
    def neighbours(condition: str, count: int) -> Iterator[None]:
        around[0] = condition
        yield

    def take_step(arm: Any) -> dict[str, Any]:
        if len(taken) == 7:
            taken.append(("", ""))
            raise EngineError("an arm ended")
        taken.append((arm, around[0]))
        return {"seconds": 2.0 if around[0] == "quiet" else 30.0 if arm == "default" else 3.0, "tokens": 1000}

    monkeypatch.setattr(busy, "child", lambda arm, *rest: contextlib.nullcontext(arm))
    monkeypatch.setattr(busy, "answer_of", lambda arm: {"threads": 2, "parameters": 220_000})
    monkeypatch.setattr(busy, "take_step", take_step)
    monkeypatch.setattr(busy, "neighbours", neighbours)
    monkeypatch.setattr(busy, "warm_started", lambda *rest: None)
    return taken


def test_it_goes_on_where_it_stopped(pretended: list[tuple[str, str]], tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "busy.md"
    page.write_text("Busy\n<!-- written by benchmarks/busy.py -->\nold\n<!-- end -->\n")
    options = BenchOptions("busy", repeats=2, models=("demo",), json=tmp_path / "a" / "busy.json", page=page)
    with pytest.raises(EngineError):
        busy.run_busy(options)
    assert busy.run_busy(options) == 0
    done = [each for each in pretended if each != ("", "")]
    cells = [(arm, beside) for arm in busy.ARMS for beside in ("quiet", *busy.NEIGHBOURS)]
    assert len(done) == 24 and all(done.count(cell) == 2 for cell in cells)
    assert busy.run_busy(options) == 0 and len(pretended) == 25  # nothing is missing
    assert json.loads(options.json.read_text())["models"]["demo"]["default"]["steps"]["memory"] == [
        {"seconds": 30.0, "tokens": 1000}
    ] * 2  # type: ignore[union-attr]  # fmt: skip
    text = page.read_text()
    assert "old" not in text and "**demo**, 0.2M parameters, 2 steps per cell." in text
    ours, default = (next(line for line in text.splitlines() if f"**{arm}**" in line) for arm in ("ours", "default"))
    # 3 seconds for 2: 1.50; 30 for 2: 15.00
    assert ours.endswith("| 2 | 2.0 (2.0–2.0) | 1.00 | 3.0 (3.0–3.0) | 1.50 | 3.0 (3.0–3.0) | 1.50 |")
    assert default.endswith("| 2 | 2.0 (2.0–2.0) | 1.00 | 30.0 (30.0–30.0) | 15.00 | 30.0 (30.0–30.0) | 15.00 |")


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--json is missing"):
        busy.run_busy(BenchOptions("busy"))
    with pytest.raises(ConfigError, match="--arms 'two' is not one of ours, default, passive, one"):
        busy.run_busy(BenchOptions("busy", arms=("two",), json=tmp_path / "x.json"))


def test_neighbours_run_meanwhile_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    real = busy.subprocess.Popen

    def popen(*arguments: Any, **how: Any) -> Any:
        started.append(real(*arguments, **how))
        return started[-1]

    monkeypatch.setattr(busy.subprocess, "Popen", popen)
    monkeypatch.setattr(busy.time, "sleep", lambda s: None)
    with busy.neighbours("quiet", 1):
        assert not started
    with busy.neighbours("memory", 2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.returncode == -9 for process in started)
