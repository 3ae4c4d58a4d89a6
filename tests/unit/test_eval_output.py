"""Output of `deepgrpo eval`: every figure of the table, files that cannot be written."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from deepgrpo.errors import DataError
from deepgrpo.eval.output import print_table, write_json, write_rows


def test_a_table_keeps_all_its_figures_in_a_file() -> None:
    metrics = {"eval/prompts": 1319.0, "eval/greedy": 0.583, "eval/greedy_se": 0.0136, "eval/length": 120.0}
    names = [f"a_rather_long_name_{i}" for i in range(8)]
    shown = io.StringIO()
    print_table({name: {"metrics": metrics, "tokens_per_s": 1200.0} for name in names}, Console(file=shown))
    lines = [line.strip() for line in shown.getvalue().splitlines()]
    assert any(line.split() == names for line in lines)
    assert [line.split() for line in lines if line.startswith("greedy")] == [["greedy", "%", *["58.3"] * 8]]


def test_the_rows_of_a_table() -> None:
    metrics = {
        "eval/prompts": 20.0, "eval/greedy": 0.5, "eval/greedy_se": 0.1147, "eval/length": 12.4, "eval/truncated": 0.05,
        "eval/unparsed": 0.1, "eval/sampled": 0.25, "eval/sampled_se": 0.02, "eval/sampled_length": 30.0,
        "eval/sampled_truncated": 0.15, "eval/sampled_unparsed": 0.2, "eval/problems": 3.0,
        "eval/pass@16": 0.9, "eval/maj@4": 0.35, "eval/pass@4": 0.6, "eval/reward/form": 0.25,
    }  # fmt: skip
    shown = io.StringIO()
    print_table({"q": {"metrics": metrics, "tokens_per_s": None}}, Console(file=shown))
    lines = [" ".join(line.split()) for line in shown.getvalue().splitlines()]
    assert [line for line in lines if any(letter.isalnum() for letter in line)] == [
        "q", "questions 20", "greedy % 50.0", "± 11.5", "tokens 12", "truncated % 5.0", "unparsed % 10.0",
        "sampled % 25.0", "± 2.0", "tokens 30", "truncated % 15.0", "unparsed % 20.0",
        "pass@4 60.0", "pass@16 90.0", "maj@4 35.0", "failed checks 3", "reward form 0.250", "tokens/s 0",
    ]  # fmt: skip


def test_files(tmp_path: Path) -> None:
    write_json(str(tmp_path / "out.json"), {"model": "größer"})
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == {"model": "größer"}
    write_rows(str(tmp_path / "rows.jsonl"), [{"id": "a"}, {"id": "b"}])
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8") == '{"id": "a"}\n{"id": "b"}\n'
    with pytest.raises(DataError, match=r"the results cannot be written: .*; name another file with --json"):
        write_json(str(tmp_path), {})
    with pytest.raises(DataError, match=r"the results cannot be written: .*; name another file with --rows"):
        write_rows(str(tmp_path / "no" / "rows.jsonl"), [])
