"""Damaged run directories: every command ends in a sentence or does its work. tests/damage.py has the damages.

The suite tries a fixed eighth of the table, each damage with one command; `make storm` tries all damages with all commands.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import pytest

import damage
from deepgrpo import cli

EVERY = 24


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damage.build(tmp_path_factory.mktemp("whole"))


def test_each_damage_ends_in_a_sentence(whole: Path, tmp_path: Path) -> None:
    commands, faults = list(damage.COMMANDS), []
    for number, (name, work) in enumerate(damage.damages()[::EVERY]):
        run = tmp_path / str(number) / "run"
        shutil.copytree(whole, run)
        work(run)
        command = commands[number % len(commands)]
        if fault := damage.outcome(command, run).fault:
            faults.append(f"{name}, {command}: {fault}")
        shutil.rmtree(run.parent)
    assert not faults


def test_a_whole_run_passes_each_command(whole: Path, tmp_path: Path) -> None:
    """Else the table would show nothing."""
    for command in damage.COMMANDS:
        if command != "compare":  # its other arms are missing
            shutil.copytree(whole, tmp_path / command / "run")
            found = damage.outcome(command, tmp_path / command / "run")
            assert found.code == 0, found.said


def test_names_that_no_file_system_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(damage.RECIPE)
    long = "n" * 300
    for arguments in (
        ("report", long), ("inspect", long), ("eval", f"./{long}"), ("probe", f"./{long}", "--data", "x=y"), ("compare", long),
        ("train", long), ("train", "--resume", long), ("train", "recipe.toml", "--run.name", long),
        ("train", "recipe.toml", "--run.dir", long),
    ):  # fmt: skip
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            assert cli.main(list(arguments)) in (1, 2)
        assert out.getvalue().startswith("error: "), arguments
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]
