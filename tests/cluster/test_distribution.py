"""What distribution costs, measured on a real Ray with a workload of a few tokens."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from surroundings import ROOT, load_script

pytest.importorskip("ray")

from ray_workers import RayWorkers, fork_workers

from benchmarks import harness as bench
from benchmarks.options import BenchOptions
from benchmarks.suites import distribution, rounds
from benchmarks.workloads import WORKLOADS, Workload

SMALL = Workload(
    "S", prompts=2, prompt=4, rollouts=3, response=8, failed=2, branches=2, vocabulary=64, hidden=64, layers=2
)  # fmt: skip
SCRIPT = ROOT / "benchmarks" / "plot_distribution.py"


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray that is started here has its workers forked."""
    # they import the reward from `benchmarks`, as they do where it is started from the root of the checkout
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    RayWorkers()
    fork_workers(monkeypatch.setattr)


@pytest.fixture
def measured(forks: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Figures of all arms with up to two workers, two rows each, a token in 2 ms."""
    monkeypatch.setitem(WORKLOADS, "S", SMALL)
    monkeypatch.setattr(distribution, "WORKERS", (0, 1, 2))
    monkeypatch.setattr(distribution, "ROWS", 2)
    tiny = {"hidden_size": 16, "num_layers": 1, "num_heads": 1, "intermediate_size": 32}
    monkeypatch.setattr(distribution, "MODELS", {"0.1M": tiny})
    path = tmp_path / "figures.json"
    options = BenchOptions("distribution", "S", repeats=2, threads=1, json=path)
    assert bench.run_bench(options, Console(file=io.StringIO(), width=200)) == 0
    return path


@pytest.mark.timeout(900)
def test_what_distribution_costs_is_taken_apart(measured: Path, tmp_path: Path) -> None:
    """Equal lengths, two workers of two rows, 2 ms a token.

    Rollouts: 2 · 3 of 8 tokens are 48 · 2 / 4 = 24 ms ideally; in four rows two waves, 32 ms; in two rows three rollouts are
    two waves as well. Branches: 2 · 2 · 2 of 2 tokens are 8 ms, and both workers have those of one prompt.
    """
    result = json.loads(measured.read_text())
    assert "ray" in result["versions"]
    found = {name: {k: v["median"] for k, v in each["parts"].items()} for name, each in result["distribution"].items()}
    kinds = ("equal", "spread", "step")
    wanted = [f"{kind}_{n}" for kind in kinds for n in (0, 1, 2)] + ["call_1", "call_2", "weights_0.1M_1", "weights_0.1M_2"]
    assert [arm["name"] for arm in result["arms"]] == wanted == list(found)
    both = found["equal_2"]
    assert [both[part] for part in ("ideal", "tail", "routing")] == pytest.approx([0.032, 0.008, 0.0], abs=1e-6)
    assert found["equal_1"]["ideal"] == found["equal_0"]["ideal"] == pytest.approx(0.064)
    assert both["rollouts/ideal"] == pytest.approx(0.024) and both["branches/ideal"] == pytest.approx(0.008)
    for name in ("equal_2", "spread_1"):
        # of each run; medians of two runs are means, so they add up too
        assert found[name]["seconds"] == pytest.approx(sum(found[name][part] for part in rounds.PARTS), abs=2e-5)
        assert found[name]["seconds"] == pytest.approx(
            found[name]["ideal"] + found[name]["tail"] + found[name]["lost"], abs=2e-5
        )
        assert found[name]["ray"] > 0 and found[name]["pickle"] > 0 and found[name]["sent_bytes"] > 100
    tokens = {arm["name"]: arm["tokens"] for arm in result["arms"]}
    for kind in kinds:
        assert tokens[f"{kind}_0"] == tokens[f"{kind}_1"] == tokens[f"{kind}_2"] > 0
    for name in ("weights_0.1M_1", "weights_0.1M_2"):
        assert found[name]["weights"] > 0 and found[name]["put"] > 0 and found[name]["weights_bytes"] > 4000
    assert found["step_2"]["learn"] > 0
    _draws_and_writes(measured, tmp_path)


def _draws_and_writes(measured: Path, tmp_path: Path) -> None:
    """The script that makes picture and tables reads what the benchmark has written."""
    pytest.importorskip("matplotlib")
    script: Any = load_script(SCRIPT)
    result, page = json.loads(measured.read_text()), tmp_path / "page.md"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    script.write(result, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| equal | 2 |" in text and "0.1M" in text
    script.draw(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
