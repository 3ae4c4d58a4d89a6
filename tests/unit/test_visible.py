"""What comes from data does not control the terminal: one nasty text through every way out."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from deepgrpo import cli
from deepgrpo.config import load_recipe
from deepgrpo.errors import DataError
from deepgrpo.eval.output import print_table
from deepgrpo.lab.compare.cells import ComparisonTable, print_comparison
from deepgrpo.ledger import Ledger, StepReport
from deepgrpo.terminal import Terminal
from deepgrpo.train.dry_run import dry_run
from deepgrpo.train.log import RunLog
from deepgrpo.visible import GuardedStream, guard_messages, plain, visible
from tiny import write_jsonl

# clear the screen, set the title, a link, an 8-bit control, NUL, direction marks, zero width, a tag, markup, an emoji name
NASTY = (
    "\x1b[2J\x1b]0;owned\x07\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\\x9b31m\x00\r\x08\x7f\u202egnp\u2066\u200b\u200d\ufeff"
    "\u2028\U000e0041[red]x[/red][link=http://evil]y[/link]:smile:"
)


ARGUMENT = NASTY.replace("\x00", "")
"""No argument and no file name has a NUL."""


def shows(text: str) -> None:
    """No control character of the nasty text arrived, and its markup did as it is."""
    controls = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n"}
    assert not controls
    assert "[red]x[/red]" in text.replace("\n", "") and ":smile:" in text.replace("\n", "")


@given(st.text(alphabet=st.characters(), max_size=40))
def test_every_character(text: str) -> None:
    shown = visible(text)
    assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in shown)
    assert visible(shown) == shown and "\n" not in plain(text)
    assert shown == text or not text.isprintable()


def test_texts_that_stay() -> None:
    for text in ("a\n\tb", "déjà √2 → 日本 🙂", "", r"\x1b"):
        assert visible(text) == text


def test_a_console() -> None:
    out = io.StringIO()
    console = Terminal(file=out, width=400)
    console.print(NASTY)
    console.print(Text(NASTY))
    table = Table(title=NASTY)
    table.add_column(NASTY)
    table.add_row(NASTY)
    table.add_row(Text(NASTY))
    console.print(table)
    console.rule(NASTY)
    for line in [line for line in out.getvalue().split("\n") if "smile" in line]:
        shows(line)
    assert out.getvalue().count("[red]x[/red]") == 7


def test_a_terminal_keeps_its_own_colours() -> None:
    out = io.StringIO()
    Terminal(file=out, force_terminal=True, width=400, color_system="standard").print(Text(NASTY, style="yellow"))
    assert out.getvalue().startswith("\x1b[33m") and out.getvalue().count("\x1b") == 2


def test_a_progress_bar() -> None:
    console = Terminal(file=io.StringIO(), force_terminal=True, width=400)
    bar = Progress(TextColumn("{task.description}", markup=False), console=console)
    bar.add_task(NASTY[:20] + "[red]x[/red]:smile:" + 40 * ".", total=1)  # rich cuts by the width before
    with console.capture() as got:
        console.print(bar.get_renderable())
    shows(got.get().replace("\x1b[0m", ""))


def test_tables_of_commands() -> None:
    out = io.StringIO()
    console = Terminal(file=out, width=400)
    print_table({NASTY: {"metrics": {"eval/greedy": 0.5}, "tokens_per_s": 1.0}}, console)
    print_comparison(console, ComparisonTable(NASTY, (NASTY, "steps"), ((NASTY, "1"),)))
    shows(out.getvalue())


def test_log_and_steps(tmp_path: Path) -> None:
    out = io.StringIO()
    with RunLog(
        tmp_path, total_steps=3, console=Terminal(file=out, force_terminal=True, width=200, color_system=None)
    ) as log:
        before = len(out.getvalue())
        log.note(NASTY)
        log.step(StepReport(1, {}, Ledger(), (NASTY,)))
    lines = [line for line in out.getvalue()[before:].split("\n") if "smile" in line]
    assert len(lines) == 2
    for line in lines:
        shows(line[line.index("\\x1b") :])
    shows((tmp_path / "log.txt").read_text())


def test_the_dry_run(recipe: Any, tmp_path: Path) -> None:
    rows = [{"question": f"1+1 {NASTY}", "answer": NASTY, "id": f"{i}{NASTY}"} for i in range(4)]
    data = {"type": "jsonl", "path": write_jsonl(tmp_path / "data.jsonl", rows), "columns": {"id": "id"}}
    model = save_own_model(tmp_path)
    out = io.StringIO()
    config = recipe(
        data=data, reward={"type": "exact"}, model={"type": "pretrained", "path": model},
        run={"name": "a\u202eb\x9b"}, sampling={"stop": [NASTY], "max_new_tokens": 8},
    )  # fmt: skip
    dry_run(config, Terminal(file=out))
    shows(out.getvalue())
    assert out.getvalue().count("[red]x[/red]") == 4  # the recipe, the prompt's id and text, the answer


def save_own_model(folder: Path) -> str:
    from tiny import save_model

    return save_model(folder / "model")


def test_errors_of_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise DataError(f"the reward function said {NASTY}")

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["train"]) == 1
    shows(capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments",
    [
        [ARGUMENT],
        ["train", f"--{ARGUMENT}"],
        ["inspect", "run", "--step", ARGUMENT],
        ["eval", "a", f"--{ARGUMENT}", "x"],
    ],
)
def test_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """They may be file names that the shell filled in."""
    with contextlib.suppress(SystemExit):
        cli.main(arguments)
    found = capsys.readouterr()
    assert "smile" in found.out + found.err
    assert not set(found.out + found.err) & set("\x1b\x9b\x00\r\x07\u202e\u200b")


@pytest.mark.parametrize("command", ["train", "report", "inspect", "compare", "eval"])
def test_names_of_files(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, ARGUMENT]) in (1, 2)
    found = capsys.readouterr().err
    assert found.startswith("error: ") and not set(found) & set("\x1b\x9b\x00\r\x07\u202e\u200b")


def test_warnings_records_and_tracebacks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory = logging.getLogRecordFactory()
    try:
        guard_messages()
        record = logging.getLogger("a library").makeRecord(
            "n", logging.WARNING, "f", 1, "%s\x1b[1mbold\x1b[0m", (NASTY,), None
        )
        assert record.getMessage().endswith("\x1b[1mbold\x1b[0m")  # colours of libraries stay
        shows(record.getMessage().removesuffix("\x1b[1mbold\x1b[0m"))
    finally:
        logging.setLogRecordFactory(factory)
    shows(warnings.formatwarning(UserWarning(NASTY), UserWarning, "f.py", 1, NASTY))
    sys.excepthook(ValueError, ValueError(NASTY), None)
    shows(capsys.readouterr().err)


def test_a_guarded_stream() -> None:
    out = io.StringIO()
    GuardedStream(out, ["plain"]).write("\x1b[31mred\x1b[0m \x1b[2J")
    assert out.getvalue() == "\x1b[31mred\x1b[0m \\x1b[2J"
    out = io.StringIO()
    GuardedStream(out, ["\x1b[31m"]).write("\x1b[31mred")
    assert out.getvalue() == "\\x1b[31mred"


def test_a_recipe_from_somebody_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text('[run]\n"\\u001b[2J[red]x[/red]\\u009b:smile:" = 1\n')
    with pytest.raises(Exception, match="run"):
        load_recipe(tmp_path / "a.toml", [])
    assert cli.main(["train", str(tmp_path / "a.toml")]) == 2
    shows(capsys.readouterr().err)
