"""Commands and recipes in the docs: subcommands, options, recipe keys and Makefile targets exist."""

from __future__ import annotations

import contextlib
import io
import re
import tomllib
from functools import cache
from typing import Any

import pytest
from surroundings import ROOT

from deepgrpo.cli import main
from deepgrpo.config import parse_config

PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
}
REST: dict[str, Any] = {
    "model": {"type": "pretrained", "path": "some/model"}, "data": {"type": "jsonl", "path": "train.jsonl"},
    "reward": {"type": "math"},
}  # fmt: skip


def code_of(text: str) -> list[str]:
    """Lines of fenced blocks, continuation lines joined, and code in backticks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def commands_of(text: str) -> list[list[str]]:
    """Words after `deepgrpo` of each command, without comments."""
    found = [re.match(r"(?:\$ )?(?:\.venv/bin/)?deepgrpo ([a-z].*)", line) for line in code_of(text)]
    return [re.split(r"\s+#\s|\s{2,}[^-\s]|\s>", match[1])[0].split() for match in found if match]


@cache
def help_of(*command: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return out.getvalue()


def unknown_words(command: list[str]) -> list[str]:
    """The subcommand or the options that `--help` does not have; recipe keys (with a dot) are not options."""
    name, *rest = command
    if name not in re.findall(r"[\w-]+", help_of()):
        return [name]
    options = [word.partition("=")[0] for word in rest if re.match(r"--[a-z][\w-]*(=|$)", word)]
    # `--warmstart none` and `--cluster none` take a table away
    tables = {"--warmstart", "--cluster", "--explore"} if name in ("train", "probe") else set()
    return [option for option in options if option not in tables and option not in help_of(name)]


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if commands_of(text)])
def test_commands_exist_with_their_options(page: str) -> None:
    wrong = {" ".join(command): unknown_words(command) for command in commands_of(PAGES[page])}
    assert {command: words for command, words in wrong.items() if words} == {}


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    asked = {match[1] for text in PAGES.values() for line in code_of(text) if (match := re.match(r"make ([a-z][\w-]*)", line))}
    assert asked
    assert asked <= targets


def recipes(page: str) -> list[dict[str, Any]]:
    return [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", PAGES[page], re.DOTALL)]


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_recipes_on_the_page_load(page: str) -> None:
    for recipe in recipes(page):
        if "base" not in recipe:
            parse_config({**REST, **recipe})


def test_what_the_checks_find() -> None:
    fenced = "```\n$ deepgrpo evall runs/a\ndeepgrpo eval runs/a --sampels 4 \\\n  --k 1  # one\n```"
    text = f"`deepgrpo train demo --run.steps 4`\n{fenced}"
    assert commands_of(text) == [
        ["evall", "runs/a"], ["eval", "runs/a", "--sampels", "4", "--k", "1"], ["train", "demo", "--run.steps", "4"],
    ]  # fmt: skip
    assert [unknown_words(command) for command in commands_of(text)] == [["evall"], ["--sampels"], []]
