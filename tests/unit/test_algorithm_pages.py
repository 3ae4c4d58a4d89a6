"""Every strategy has a page under docs/algorithms, in the same order, with a recipe that loads."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from surroundings import ROOT

from deepgrpo.config import ExploreConfig, UserExplore, load_recipe, parse_config, tables_of, to_toml

DOCS = ROOT / "docs"
SECTIONS = {model.model_fields["type"].default: model for model in tables_of(ExploreConfig) if model is not UserExplore}
# your_own.md is tested by test_user_strategy.py
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (DOCS / "algorithms").glob("*.md") if path.stem != "your_own"}
REST: dict[str, Any] = {
    "model": {"type": "scratch"}, "data": {"type": "synthetic"}, "reward": {"type": "task"},
    "sampling": {"max_new_tokens": 1024},
}  # fmt: skip


def headings(page: str) -> list[str]:
    return re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)


def test_every_strategy_has_a_page_and_so_have_the_switches() -> None:
    assert set(PAGES) == {*SECTIONS, "switches"}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_page_tells_the_same_things_in_the_same_order(name: str) -> None:
    found = headings(PAGES[name])
    assert found[0].startswith(f"{name}: ")
    expected = ["Idea", "Formula", "Recipe", "Where paper, released code and ours differ", "Result here"]
    assert [heading for heading in found if heading in expected] == expected
    assert found[-1].startswith("To and from ")


@pytest.mark.parametrize("name", PAGES)
def test_results_lead_to_the_table_of_all_methods(name: str) -> None:
    (result,) = re.findall(r"^## Result here\n\n(.*?)(?=^## |\Z)", PAGES[name], re.DOTALL | re.MULTILINE)
    assert "](../results/methods.md" in result


@pytest.mark.parametrize("name", SECTIONS)
def test_the_recipe_of_a_page_loads_and_spells_out_the_defaults(name: str, tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```toml\n(.*?)```", PAGES[name], re.DOTALL)
    config = parse_config({**REST, **tomllib.loads(snippet)})
    assert config.explore == SECTIONS[name]()
    (tmp_path / "recipe.toml").write_text(to_toml(config))
    assert load_recipe(tmp_path / "recipe.toml") == config


@pytest.mark.parametrize("name", PAGES)
def test_entries_of_the_details_exist(name: str) -> None:
    details = (DOCS / "details.md").read_text(encoding="utf-8")
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in headings(details)}
    assert set(re.findall(r"details\.md#([\w-]+)", PAGES[name])) <= anchors
    for other, anchor in re.findall(r"\]\((\w+)\.md(?:#([\w-]+))?\)", PAGES[name]):
        assert other in PAGES
        assert not anchor or anchor in {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings(PAGES[other])}
