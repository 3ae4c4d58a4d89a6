"""The documentation site: every page is in the navigation, links lead to pages, generated pages have every name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from surroundings import ROOT, load_script

import deepgrpo
from deepgrpo.config import Config


@pytest.fixture(scope="module")
def site() -> ModuleType:
    return load_script(ROOT / "scripts" / "site.py")


@pytest.fixture(scope="module")
def written(site: ModuleType) -> dict[str, str]:
    return dict(site.written())


def named(entries: list[Any]) -> list[str]:
    """Pages of a navigation, in their order."""
    found: list[str] = []
    for entry in entries:
        for part in entry.values() if isinstance(entry, dict) else [entry]:
            found += named(part) if isinstance(part, list) else [part]
    return found


def test_the_navigation_names_every_page_once(site: ModuleType, written: dict[str, str]) -> None:
    nav = named(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"])
    assert len(nav) == len(set(nav))
    pages = {*written, *site.GENERATED}
    assert set(nav) - pages == set(), "the navigation of zensical.toml names pages that do not exist"
    # a source file is a page because another page links it
    lost = {page for page in pages - set(nav) if not page.startswith("source/")}
    assert lost == set(), "name these pages in the navigation of zensical.toml"


def test_links_lead_to_pages_and_files(site: ModuleType, written: dict[str, str]) -> None:
    files = {site.place(f"docs/{name}") for name in site._files_of_docs()}
    for name, text in written.items():
        prose = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s#]+)", prose):
            if not re.match(r"[a-z]+:", target):
                path = (Path("/") / name).parent.joinpath(target).resolve().relative_to("/").as_posix()
                assert path in written or path in files or path in site.GENERATED, (name, target)


def test_what_becomes_of_a_link(site: ModuleType) -> None:
    linked: set[str] = set()

    def there(text: str, page: str = "docs/algorithms/deep.md") -> str:
        return str(site.with_links_of_the_site(text, page, linked))

    assert there("[a](../concepts.md#gamma) [b](root.md) [c](#here) [d](https://x.y/z)") == (
        "[a](../concepts.md#gamma) [b](root.md) [c](#here) [d](https://x.y/z)"
    )
    assert there("[r](../../README.md#use) [c](../../CONTRIBUTING.md)") == "[r](../index.md#use) [c](../contributing.md)"
    pictures = there("[r](docs/results/README.md) ![p](docs/images/a.png)", "README.md")
    assert pictures == "[r](results/index.md) ![p](images/a.png)"
    assert there("[home](../../README.md)", "docs/results/README.md") == "[home](../index.md)"
    assert linked == set()
    assert there("[loop](../../src/deepgrpo/train/loop.py)") == "[loop](../source/src/deepgrpo/train/loop.py.md)"
    assert linked == {"src/deepgrpo/train/loop.py"}
    assert there("[answers](../../tests/answers)") == "answers"  # a folder is no page
    assert there("```\n[a](../../README.md)\n```") == "```\n[a](../../README.md)\n```"


def test_sources_and_notebooks_are_pages(site: ModuleType, written: dict[str, str]) -> None:
    assert written["source/examples/own_loop.py.md"].startswith("# examples/own_loop.py\n\n```python\n")
    notebook = written["source/examples/first_steps.ipynb.md"]
    assert "```python\n" in notebook and "](../../library.md)" in notebook
    assert '<div class="output">' in notebook  # recorded tables
    # a fence inside is no end of the block
    assert site._fenced("a\n```\nb", "text") == "````text\na\n```\nb\n````"


def test_the_page_of_keys_has_every_key(site: ModuleType) -> None:
    page = site.keys_page()
    for section, info in Config.model_fields.items():
        assert re.search(rf"^## `\[{info.alias or section}\]`", page, re.MULTILINE), section
    assert "`explore.gamma` = `2.0` <small>number</small>\n\n:   Exponent of the depth bias" in page
    assert "`reward.parts.NAME.weight` = `1.0`" in page
    assert "P(success \\| depth)" in page  # no table begins there


def test_the_page_of_names_has_every_public_name(site: ModuleType) -> None:
    page = site.api_page()
    targets = re.findall(r"^::: (deepgrpo\.[\w.]+)\.(\w+)$", page, re.MULTILINE)
    assert {name for _, name in targets} == {*deepgrpo.__all__} - {"__version__"}
    for module, name in targets:
        path = ROOT / "src" / Path(*module.split("."))
        source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
        assert re.search(rf"\b{name}\b", source), (module, name)
    assert page.index("## Runs") < page.index("## Errors")


def test_the_page_of_commands(site: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(arguments: list[str]) -> int:
        print("usage: deepgrpo", *arguments, "  ")
        raise SystemExit(0)

    assert site._help_of(command, "train") == "usage: deepgrpo train --help"
