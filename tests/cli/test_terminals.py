"""Terminals that cannot show everything: another encoding, no width, a reader that has gone."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from conftest import TINY
from deepgrpo.cli import main


@pytest.fixture
def recipe() -> str:
    """A run without steps: its first line has a middle dot, and so has its dry run."""
    model = "\n".join(f"{key} = {value!r}" for key, value in TINY.items())
    path = Path("tiny.toml")
    path.write_text(
        f"[run]\nsteps = 0\n[model]\n{model}\n[data]\ntype = 'synthetic'\nchain_length = 2\n[reward]\ntype = 'task'\n"
        "[sampling]\nmax_new_tokens = 8\n",
        encoding="utf-8",
    )
    return str(path)


def test_a_terminal_without_our_characters(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    dry = ["train", recipe, "--dry-run", "--run.name", "other"]
    for call in (["train", recipe], dry, ["train", "--help-config"], ["recipes"]):
        assert main(call) == 0, call
    said = shown.getvalue().decode("ascii")
    assert "trainable parameters on cpu ? " in said
    assert " ? endless prompts ? explore deep" in said


@pytest.mark.parametrize("columns", ["0", "1"])
def test_a_terminal_without_width(recipe: str, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert main(["train", recipe, "--dry-run"]) == 0


def test_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few lines fit into the buffer: they are written when the command ends, and not by the interpreter after it."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["recipes"]) == 0
