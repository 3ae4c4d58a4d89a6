"""Terminals that cannot show everything: another encoding, no width, a reader that has gone."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from conftest import TINY
from deepgrpo.cli import main
from deepgrpo.progress import Display, Phase


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


def test_long_work_of_a_run_is_followed(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of a run tells what it does, how much there is of it, and reaches that number."""
    done: dict[str, tuple[int | None, int, str]] = {}
    close = Display.close

    def closed(display: Display, phase: Phase) -> None:
        chain, each = [phase.what], phase
        while each.outer is not None:
            each = each.outer
            chain.insert(0, each.what)
        done[" > ".join(chain)] = phase.total, phase.done, phase.figures
        close(display, phase)

    monkeypatch.setattr(Display, "close", closed)
    keys = ["--run.steps", "1", "--run.prompts_per_step", "2", "--explore", "{type = 'root', num_rollouts = 3}"]
    keys += ["--warmstart", "{steps = 3}", "--eval", "{every = 1, samples = 2, data = {type = 'synthetic', size = 2}}"]
    keys += ["--loss.drop_zero_advantage", "false"]
    assert main(["train", recipe, *keys]) == 0
    assert {"reading data", "reading eval.data", "testing tree packs", "saving", "learning"} <= set(done)
    total, steps, figures = done["warm start"]
    assert total == steps == 3 and figures.startswith("loss ")
    total, sequences, figures = done["sampling"]
    assert total == sequences == 6 and figures.endswith(" tokens")
    assert done["evaluation"][:2] == (6, 6)  # 2 greedy responses, 4 drawn ones
    assert done["evaluation > sampling"][:2] == (4, 4)
    packs, learned, _ = done["learning"]
    assert packs == learned
    assert packs


def test_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few lines fit into the buffer: they are written when the command ends, and not by the interpreter after it."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["recipes"]) == 0
