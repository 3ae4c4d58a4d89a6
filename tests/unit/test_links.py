"""Links, anchors and file names in README, CONTRIBUTING, CHANGELOG and docs/ exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from surroundings import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

USERS_OWN = {"my_reward.py", "mine.py", "bad.py", "reward.py", "strategy.py", "loss.py"}
"""Files that a page lets its reader write."""
HOMES = ("", "src/deepgrpo/", "docs/", "recipes/")
"""Folders that a name may be relative to, besides the page's own."""
TOP = ("src/", "docs/", "recipes/", "benchmarks/", "scripts/", "tests/", "lab/")


def prose_of(text: str) -> str:
    """A page without fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@cache
def anchors(page: Path) -> frozenset[str]:
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.*)$", prose_of(page.read_text(encoding="utf-8")), re.MULTILINE):
        name = slug(heading)
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return frozenset(found)


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    return broken


@cache
def file_names() -> frozenset[str]:
    folders = ("src", "benchmarks", "scripts", "tests", "docs", "recipes")
    return frozenset(path.name for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())


def missing_files(page: Path, text: str) -> list[str]:
    """Names in backticks that look like files of the repository and are not."""
    missing = []
    for name in re.findall(r"`([\w.\-+]+(?:/[\w.\-+]+)*/?)`", prose_of(text)):
        if name in USERS_OWN or not (name.startswith(TOP) or name.endswith(".py")):
            continue
        if "/" not in name:
            found = name in file_names()
        else:
            found = any((ROOT / home / name).exists() for home in HOMES) or (page.parent / name).exists()
            if not found and not name.startswith(TOP):
                # a package's table names files relative to the package
                packages = [*(ROOT / "src" / "deepgrpo").iterdir(), ROOT / "benchmarks"]
                found = any((package / name).exists() for package in packages)
        if not found:
            missing.append(name)
    return missing


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_and_anchor_resolves(name: str) -> None:
    assert broken_links(ROOT / name, (ROOT / name).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", NAMES)
def test_every_file_in_backticks_exists(name: str) -> None:
    assert missing_files(ROOT / name, (ROOT / name).read_text(encoding="utf-8")) == []


def test_what_the_checks_find() -> None:
    page = ROOT / "docs" / "made_up.md"
    links = "[a](concepts.md#gamma) [b](concepts.md#nowhere) [c](gone.md) [d](https://x.y/z)"
    assert broken_links(page, links) == ["concepts.md#nowhere", "gone.md"]
    assert missing_files(page, "`train/loop.py` `train/gone.py` `nowhere.py`") == ["train/gone.py", "nowhere.py"]
    assert missing_files(page, "`recipes/lab/methods.toml` `scripts/gone.sh` `mine.py`") == ["scripts/gone.sh"]
    assert slug("Dr. GRPO, DAPO: `loss.ratio`") == "dr-grpo-dapo-lossratio"
