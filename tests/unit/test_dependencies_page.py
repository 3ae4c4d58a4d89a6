"""Every package in pyproject.toml has a row in docs/dependencies.md."""

from __future__ import annotations

import re
import tomllib

from surroundings import ROOT


def test_every_dependency_has_its_row() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = {re.split(r"[\[<>=!~; ]", line)[0] for lines in (project["dependencies"], *extras.values()) for line in lines}
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"[\w.-]+", " ".join(line for line in page.splitlines() if line.startswith("|"))))
    assert asked - rows - {"deepgrpo"} == set()
