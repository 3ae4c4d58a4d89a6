"""Tables of the terminal at 60 and 80 columns: no line is too long, no cell is cut, no figure is lost."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from benchmarks import harness
from deepgrpo.cli import Recipes, run_recipes
from deepgrpo.eval.output import print_table
from deepgrpo.lab.compare.cells import ComparisonTable, print_comparison
from deepgrpo.lab.probe import tables as probe
from deepgrpo.lab.probe.findings import ArmFigures, Figure, Findings
from deepgrpo.ledger import Ledger, StepReport
from deepgrpo.report.inspect import run_inspect
from deepgrpo.report.options import InspectOptions
from deepgrpo.terminal import Terminal, print_columns
from deepgrpo.train.log import RunLog
from saved_runs import small_tree, write_run

Shown = Callable[[Console], Any]
WIDTHS = pytest.mark.parametrize("width", [60, 80])


def shown(width: int, show: Shown) -> str:
    console = Terminal(file=io.StringIO(), force_terminal=True, color_system=None, width=width)
    show(console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width, text
    assert "…" not in text
    return text


def has(text: str, cells: Sequence[str]) -> None:
    missing = [cell for cell in cells if cell not in text]
    assert not missing, (missing, text)


@WIDTHS
def test_probe(width: int) -> None:
    names = ("root", "deep", "random", "treerl", "a_strategy_with_a_long_name")
    figure = Figure(0.0312, -0.0123, 0.0745)
    arms = tuple(ArmFigures(name, 64.0, 12345.6, figure, figure, figure, 0.61, 0.32, 0.87, 0.44) for name in names)
    findings = Findings(arms, (), 0.8, True, True)
    text = shown(width, lambda out: print_columns(out, *probe._strategies(findings)))
    has(text, ["12,346", "0.03 [-0.01, 0.07]", "0.031 [-0.012, 0.074]", "mixed/1k", *names[:4]])
    text = shown(width, lambda out: print_columns(out, probe.STREAM_COLUMNS, probe._streams(findings)))
    has(text, ["0.61", "0.32", "0.87", "44%", *names[:4]])


@WIDTHS
def test_compare(width: int) -> None:
    """A cell of a difference takes 40 columns: the three of them follow one another."""
    cells = [f"+1{i}.0 [-10.0, +20.0] (12/10, 0.054), 1{i}0 steps" for i in range(3)]
    title = "Difference to grpo on untouched questions, points, paired by seed [95% interval] (seeds above/below, p)"
    table = ComparisonTable(title, ("arm", "greedy", "area over 120 steps", "pass@4"), (("deep", *cells), ("fr3e", *cells)))
    text = shown(width, lambda out: print_comparison(out, table))
    has(text, [*cells, "area over 120 steps", "pass@4"])
    assert text.count("deep") == 3 and text.count("arm") == 3
    columns = ("arm", "seeds", "gradient norm", "entropy at the end", "length at the end", "mixed groups, %", "tokens")
    row = ("deep", "8", "0.812", "0.333", "38.2", "62.0 ±7.1", "1.25M")
    has(shown(width, lambda out: print_comparison(out, ComparisonTable("How it went", columns, (row, row)))), row)


@WIDTHS
def test_bench(width: int) -> None:
    arms = [
        {"name": name, "median_s": 12.34, "min_s": 11.9, "max_s": 13.02, "peak_mb": 2345.0, "tokens": 262_144, "note": note}
        for name, note in (("tree_bf16_no_keep", ""), ("rows", "left out: it does not fit into the memory of this machine"))
    ]
    result = {
        "threads": 2, "baseline": "tree_bf16_no_keep", "arms": arms, "ratios": {"rows": 1.91}, "pairs": {},
        "machine": {"processor": "a processor", "load": 0.1}, "versions": {"torch": "2.9"},
    }  # fmt: skip
    options: Any = SimpleNamespace(part="sampling", workload="D")
    text = shown(width, lambda out: harness._show(out, options, result))
    has(text, ["12.34", "11.90–13.02", "1.91", "2345", "262,144", "machine"])


@WIDTHS
def test_eval(width: int) -> None:
    figures = {"metrics": {"eval/prompts": 1319.0, "eval/greedy": 0.581, "eval/pass@4": 0.714}, "tokens_per_s": 1234.0}
    names = ("gsm8k", "math500", "olympiadbench", "minerva_math", "amc23", "aime24")
    text = shown(width, lambda out: print_table(dict.fromkeys(names, figures), out))
    has(text, [*names, "greedy %"])
    assert text.count("58.1") == len(names)


@WIDTHS
def test_inspect(width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", {10: [small_tree("a-prompt-with-a-long-name"), small_tree("q2")]})
    for options in ({}, {"step": 10}):
        assert run_inspect(InspectOptions(run, width=width, **options)) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "deepgrpo inspect" not in line]
        assert max(map(len, lines)) <= width
        if options:
            has("\n".join(lines), ["a-prompt-with-a-long-name", "1/2", "1/1", "mixed", small_tree().prompt.question])


@WIDTHS
def test_train(width: int, tmp_path: Path) -> None:
    metrics = {
        "main/reward": 0.41, "main/mixed": 0.62, "branch/reward": 0.23, "eval/greedy": 0.58, "main/entropy": 0.333,
        "main/length": 38.2, "grad_norm": 0.8, "tokens_per_s": 19_000.0,
    }  # fmt: skip
    console = Terminal(file=io.StringIO(), force_terminal=True, color_system=None, width=width)
    with RunLog(tmp_path, total_steps=60, console=console) as log:
        before = len(console.file.getvalue())  # type: ignore[attr-defined]
        log.step(StepReport(12, metrics, Ledger()))
        assert log.display.live is not None
        log.display.live.refresh()
        text = console.file.getvalue()[before:]  # type: ignore[attr-defined]
    import re

    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()]
    assert max(map(len, lines)) <= width and "…" not in text
    assert any(line.startswith("step 12/60  reward .41  mixed 62%") for line in lines)
    assert any(line.startswith("    ") and line.endswith("grad 0.8  19k tok/s") for line in lines)
    bar = [line for line in lines if "12/60 " in line and "━" in line]
    assert bar and bar[-1].endswith(("reward .41  eval .58", "eval .58  entropy .33", "tok/s"))
    # log.txt keeps the line whole
    assert "step 12/60  reward .41  mixed 62%  branch .23  eval .58  entropy .33  len 38" in (tmp_path / "log.txt").read_text()


def test_a_file_gets_the_whole_table() -> None:
    out = Console(file=io.StringIO(), width=80)
    print_columns(out, ("arm", *(f"column {i}" for i in range(20))), [("deep", *(str(10**9 + i) for i in range(20)))])
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 3 and lines[2].split() == ["deep", *(str(10**9 + i) for i in range(20))]


@pytest.mark.parametrize("width", [60, 80])
def test_recipes(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run_recipes(Recipes())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert [line for line in lines if line.startswith("gsm8k-qwen2.5-0.5b-deep-vllm  DEEP-GRPO of the paper")]
