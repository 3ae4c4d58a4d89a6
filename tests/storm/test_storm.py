"""A little storm: some of each subject of `make storm`, whose figures are in docs/results/reliability.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from storm.damaged import run_damages
from storm.kills import Kill, Storm, kills
from storm.page import summary, write_page
from storm.race import RACES, run_races
from storm.starter import Starter


@pytest.fixture(scope="module")
def starter() -> Starter:
    return Starter()


@pytest.fixture(scope="module")
def storm(starter: Starter, tmp_path_factory: pytest.TempPathFactory) -> Storm:
    return Storm(starter, tmp_path_factory.mktemp("kills"))


def operation(storm: Storm, first: str, of: str) -> Kill:
    """A SIGKILL before the first operation of that kind on such a path."""
    number = next(i for i, each in enumerate(storm.operations) if each.startswith(first) and of in each)
    return Kill(number, "operation", (number + 0.5) / len(storm.operations))


@pytest.mark.parametrize(
    ("first", "of"),
    [("os.rename", "checkpoints/.tmp-"), ("os.remove", "state.json"), ("open", ".tmp-start")],
)
def test_a_kill_at_a_file_operation(storm: Storm, first: str, of: str) -> None:
    """A checkpoint that is whole but has no name yet, one that is half deleted, the start model."""
    facts = storm.kill(operation(storm, first, of))
    assert (facts["fault"], facts["differences"]) == (None, []), facts


def test_a_kill_while_resuming(storm: Storm) -> None:
    facts = storm.kill(Kill(0, "while resuming", 0.6))
    assert (facts["fault"], facts["differences"]) == (None, []), facts


def test_two_runs_do_not_share_a_directory(starter: Starter, tmp_path: Path) -> None:
    races = run_races(starter, tmp_path, 1, done=[f"{name} 0" for name in RACES if name != "two starts"])
    for name, facts in races:
        assert (facts["fault"], facts["differences"]) == (None, []), (name, facts)
        assert sorted(facts["codes"])[0] == 0 < sorted(facts["codes"])[1], facts


def test_damaged_directories(starter: Starter, tmp_path: Path) -> None:
    for name, facts in run_damages(starter, tmp_path, share=0.005):
        assert facts["fault"] is None and not facts["other_result"], (name, facts)


def test_kills_are_drawn_by_the_seed() -> None:
    drawn = kills(50)
    assert drawn == kills(50) and drawn != kills(50, seed=1)
    assert [each.way for each in drawn].count("operation") == 25 and len({each.way for each in drawn}) == 6


def test_the_page(tmp_path: Path) -> None:
    """Figures of two kills, of which one left a file over."""
    common = {"way": "moment", "fault": None, "phase": "between checkpoints", "sentences": []}
    cases: list[dict[str, Any]] = [
        {"name": "a", "differences": [], **common}, {"name": "b", "differences": ["surplus checkpoints/step-000003"], **common}
    ]  # fmt: skip
    figures = {"seconds": 60.0, "summary": summary("kills", cases)}
    folder = tmp_path / "reliability"
    folder.mkdir()
    (folder / "kills.json").write_text(json.dumps(figures))
    assert write_page(folder, tmp_path / "page.md", ["kills", "races"]) == 1
    page = (tmp_path / "page.md").read_text()
    assert "| Kills | 2 | 1 | 1.0 |" in page and "surplus checkpoints/step-000003" in page and "Races" not in page
