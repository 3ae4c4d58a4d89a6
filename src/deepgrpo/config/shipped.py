"""Shipped recipes: `recipes/` of a checkout, `deepgrpo/recipes/` of an installed package."""

from __future__ import annotations

import textwrap
from pathlib import Path

from deepgrpo.errors import ConfigError, did_you_mean


def recipe_dir() -> Path:
    """The directory with the shipped recipes. Raises ConfigError if this installation has none."""
    package = Path(__file__).parents[1]
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if (folder / "demo.toml").is_file():
            return folder
    raise ConfigError("this installation has no recipes; install the package again, or name a .toml file by its path")


def list_recipes() -> list[tuple[str, str]]:
    """Name and first comment line of every shipped recipe, in order of the names."""
    return [(path.stem, _first_comment(path)) for path in sorted(recipe_dir().glob("*.toml"))]


def find_recipe(recipe: str) -> Path:
    """The file of a recipe, given by path or by the name of a shipped one.

    A file in the working directory takes precedence over a shipped recipe of the same name. Anything that looks like a path
    (it ends in .toml or has a directory) is returned unchecked: `load_recipe` explains a bad one.
    Raises ConfigError, with the nearest name, if it is neither.
    """
    path = Path(recipe).expanduser()
    if path.is_file() or path.suffix == ".toml" or len(path.parts) != 1:
        return path
    return shipped_recipe(recipe)


def shipped_recipe(name: str) -> Path:
    """The file of a shipped recipe. Raises ConfigError, with the nearest name, if there is none of this name."""
    names = [known for known, _ in list_recipes()]
    if name in names:
        return recipe_dir() / f"{name}.toml"
    raise ConfigError(f"recipe {name!r} does not exist; {did_you_mean(name, names, 'shipped recipes')}")


def describe_recipes(width: int | None) -> str:
    """List the shipped recipes, wrapped to a width in columns; None: one line each."""
    recipes = list_recipes()
    longest = max(len(name) for name, _ in recipes)
    lines = [f"{name:<{longest}}  {comment}" for name, comment in recipes]
    if width is not None:
        indent = " " * min(longest + 2, width // 3)
        lines = [textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False) for line in lines]
    return "\n".join([*lines, "", "print one: deepgrpo recipes NAME", "run one:   deepgrpo train NAME"])


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
