"""The trainer, the packer and the loss never learn a strategy's name: a new one must not need a line of theirs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import deepgrpo
from deepgrpo.config import ExploreConfig, tables_of

SECTIONS = {model.__name__ for model in tables_of(ExploreConfig)}
TYPES = {model.model_fields["type"].default for model in tables_of(ExploreConfig)}
PACKAGES = ["credit", "engines", "eval", "loss", "model", "pack", "prompts", "rewards", "train"]
FILES = [path for name in PACKAGES for path in sorted((Path(deepgrpo.__file__).parent / name).rglob("*.py"))]


def names_in(source: str) -> set[str]:
    """Sections and files of strategies that a file mentions in code, and strategies' types with which it compares something.

    "user" is a turn of a chat as well.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names if alias.name in SECTIONS}
            found |= {node.module or ""} & {f"deepgrpo.explore.{name}" for name in TYPES}
        elif isinstance(node, ast.Attribute | ast.Name):
            found |= {node.attr if isinstance(node, ast.Attribute) else node.id} & SECTIONS
        elif isinstance(node, ast.Compare | ast.Match):
            found |= {str(each.value) for each in ast.walk(node) if isinstance(each, ast.Constant)} & TYPES - {"user"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_file_names_a_strategy(path: Path) -> None:
    assert not names_in(path.read_text(encoding="utf-8"))


def test_a_name_would_be_seen() -> None:
    assert names_in("from deepgrpo.config import Config, DeepExplore") == {"DeepExplore"}
    assert names_in("from deepgrpo.explore.fr3e import anchors") == {"deepgrpo.explore.fr3e"}
    assert names_in('if config.explore.type in ("root", "deep"): pass') == {"root", "deep"}
    assert names_in("isinstance(explore, config.SPOTreeExplore)") == {"SPOTreeExplore"}
    assert len(FILES) > 30
