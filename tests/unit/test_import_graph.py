"""The import graph of the package: no two files need each other, not even by an import inside a function."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

import grimp
import pytest

import deepgrpo


def cycles(imports: Mapping[str, Set[str]]) -> list[list[str]]:
    """Strongly connected components with more than one module: every module of one can reach every other."""
    reached: dict[str, set[str]] = {}
    for start in imports:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = imports[ahead.pop()] - seen
            seen |= new
            ahead += new
        reached[start] = seen
    groups = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in imports if a in reached[a]}
    return [list(group) for group in sorted(groups)]


@pytest.mark.parametrize(
    ("imports", "found"),
    [
        ({"a": "b", "b": "c", "c": ""}, []),
        ({"a": "bc", "b": "d", "c": "d", "d": ""}, []),  # a diamond is no cycle
        ({"a": "b", "b": "a", "c": "a"}, [["a", "b"]]),
        ({"a": "b", "b": "c", "c": "a", "d": "e", "e": "da"}, [["a", "b", "c"], ["d", "e"]]),
    ],
)
def test_cycles(imports, found):
    assert cycles({name: set(others) for name, others in imports.items()}) == found


def test_no_file_takes_part_in_a_cycle_of_imports():
    graph = grimp.build_graph("deepgrpo", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    files = [path for path in Path(deepgrpo.__file__).parent.rglob("*.py") if path.name != "__init__.py"]
    assert len(imports) > len(files) > 100  # the whole package is in the graph, with its folders
    problems = [
        f"{detail['importer']} line {detail['line_number']}: {detail['line_contents']}"
        for group in cycles(imports)
        for importer in group
        for imported in sorted(imports[importer] & set(group))
        for detail in graph.get_import_details(importer=importer, imported=imported)
    ]
    assert problems == [], "these imports form a cycle; move what both sides need into a file below them"
