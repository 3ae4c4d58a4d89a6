"""The generated tables of docs/architecture.md are those of the source tree."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from surroundings import ROOT, load_script


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return load_script(ROOT / "scripts" / "module_tables.py")


def test_the_page_is_that_of_the_source_tree(tables: ModuleType) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    fresh = tables.rewritten(page, ROOT)
    stale = sorted(set(fresh.splitlines()) ^ set(page.splitlines()))
    assert page == fresh, "stale; run: .venv/bin/python scripts/module_tables.py\n" + "\n".join(stale)


def test_a_table_per_package_in_reading_order_with_first_lines(tables: ModuleType, tmp_path: Path) -> None:
    package = tmp_path / "house"
    for name, text in {
        "__init__.py": '"""The house.\n\nMore of it.\n"""',
        "attic/__init__.py": "",
        "attic/trunk.py": '"""P(found | trunk)."""',
        "attic/box/lid.py": '"""A lid:\n\n    open\n"""',
        "cellar/wine.py": '"""Wine."""',
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    assert tables.module_tables(package, ("", "cellar")) == (
        "**house/**\n\n| file | |\n|---|---|\n| `__init__.py` | The house |\n\n"
        "**cellar/**\n\n| file | |\n|---|---|\n| `wine.py` | Wine |\n\n"
        "**attic/**\n\n| file | |\n|---|---|\n| `trunk.py` | P(found \\| trunk) |\n| `box/lid.py` | A lid |"
    )


def test_a_module_without_a_docstring_is_refused(tables: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mute.py").write_text("x = 1\n")
    with pytest.raises(SystemExit, match=r"mute\.py has no docstring"):
        tables.module_tables(tmp_path, ("",))


def test_layers_top_first_and_the_other_contracts_by_name(tables: ModuleType) -> None:
    contracts = [
        {"type": "layers", "name": "layers", "layers": ["cli", "(lab) : (report)", "model | pack"]},
        {"type": "forbidden", "name": "only cluster imports Ray"},
    ]
    assert tables.layer_table(contracts) == (
        "| layer | modules of one layer import each other |\n|---|---|\n"
        "| `cli` |  |\n| `lab`, `report` | yes |\n| `model`, `pack` | no |\n\n"
        "Further contracts:\n\n- only cluster imports Ray"
    )
