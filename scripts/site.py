"""Pages of the documentation site: docs/ and the pages of the root with links of the site, and generated reference pages.

    .venv/bin/python scripts/site.py [FOLDER]        default: build/pages, which zensical.toml names; `make docs` does both

The pages are written for a reader of the repository. Here README.md becomes the first page, a link to a source file leads to a
page with its code, and the public names, recipe keys and commands get pages made from their docstrings.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import posixpath
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"

HOME = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the repository's root -> their place on the site."""

_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_WHOLE_LINK = re.compile(r"\[([^\]\[]+)\]\(([^)\s#]+)\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1[^\S\n]*$", re.DOTALL | re.MULTILINE)


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0]) if arguments else PAGES
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in (written() | {name: make() for name, make in GENERATED.items()}).items():
        _write(folder / name, text)
    for name in _files_of_docs():
        if not name.endswith(".md"):
            _write(folder / place(f"docs/{name}"), (ROOT / "docs" / name).read_bytes())


def written() -> dict[str, str]:
    """Pages of the repository and the source files that they link, by their place on the site."""
    made: dict[str, str] = {}
    linked: set[str] = set()
    for name in [*HOME, *(f"docs/{name}" for name in _files_of_docs() if name.endswith(".md"))]:
        text = (ROOT / name).read_text(encoding="utf-8")
        made[place(name)] = with_links_of_the_site(text, name, linked)
    made["index.md"] = "---\nhide: [navigation]\n---\n" + made["index.md"]
    while missing := sorted(name for name in linked if place(name) not in made):
        for name in missing:
            made[place(name)] = source_page(name, linked)
    return made


def _files_of_docs() -> list[str]:
    docs = ROOT / "docs"
    return sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*") if path.is_file())


def place(name: str) -> str:
    """Place on the site of a file of the repository."""
    if name in HOME:
        return HOME[name]
    if name.startswith("docs/"):
        return re.sub(r"(^|/)README\.md$", r"\1index.md", name.removeprefix("docs/"))
    return f"source/{name}.md"


def with_links_of_the_site(text: str, name: str, linked: set[str]) -> str:
    """A page with relative links as they are on the site; adds source files that it links to `linked`.

    A link to a folder becomes its text.
    """
    here = posixpath.dirname(name)

    def there(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(here, target))
        if not path.startswith("docs/") and path not in HOME:
            linked.add(path)
        return posixpath.relpath(place(path), posixpath.dirname(place(name)) or ".") + anchor

    def of_prose(prose: str) -> str:
        return _LINK.sub(there, _WHOLE_LINK.sub(lambda link: link[1] if (ROOT / here / link[2]).is_dir() else link[0], prose))

    return _outside_fences(text, of_prose)


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


# ---------------------------------------------------------------- sources


def source_page(name: str, linked: set[str]) -> str:
    """A file of the repository as a page; a notebook as its cells with their recorded outputs."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        return with_links_of_the_site("\n\n".join(_cells(json.loads(text)["cells"])) + "\n", name, linked)
    return f"# {name}\n\n{_fenced(text, {'.py': 'python', '.toml': 'toml'}.get(Path(name).suffix, 'text'))}\n"


def _cells(cells: list[dict[str, Any]]) -> Iterator[str]:
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
            continue
        yield _fenced(source, "python")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "text/html" in data:
                yield f'<div class="output">{"".join(data["text/html"])}</div>'.replace("\n", "")
            else:
                yield _fenced("".join(output.get("text") or data.get("text/plain") or []), "text")


def _fenced(text: str, language: str) -> str:
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall("^`{3,}", text, re.MULTILINE))])
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


# ---------------------------------------------------------------- reference


def api_page() -> str:
    """Public names under the headings of `_HOME` in src/deepgrpo/__init__.py; mkdocstrings puts in their docstrings."""
    text = (ROOT / "src" / "deepgrpo" / "__init__.py").read_text(encoding="utf-8")
    table = re.search(r"^_HOME = \{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE)
    assert table
    parts = [
        "# Python\n\nEverything that `from deepgrpo import …` gives. [A library](../library.md) shows how the names work "
        "together; other names may move between versions.\n"
    ]
    for line in table[1].splitlines():
        if heading := re.fullmatch(r"    # (.*)", line):
            parts.append(f"## {heading[1].capitalize()}\n")
        else:
            ((name, module),) = ast.literal_eval("{" + line.partition(" #")[0] + "}").items()
            module = "library.training" if name == "train" else module  # the package is called in its place
            parts.append(f"::: deepgrpo.{module}.{name}\n")
    return "\n".join(parts)


def keys_page() -> str:
    """Every key of a recipe, as `deepgrpo train --help-config` says it."""
    from deepgrpo.config.explain import describe_keys

    parts = [
        "# Recipe keys\n\nEvery table and key of a recipe with its default and type; `deepgrpo train --help-config SECTION` "
        "prints the same. `…` marks a key without a default.\n"
    ]
    for block in describe_keys(width=100_000).strip().split("\n\n"):
        title, *lines = block.splitlines()
        parts.append("## " + re.sub(r"^(\[[^\]]*\])", r"`\1`", title) + "\n")
        for line in lines:
            if line.startswith("      "):
                parts.append(f":   {_prose(line.strip())}\n")
            elif key := re.fullmatch(r"  ([a-z][\w.]*(?:\.NAME[\w.]*)?) = (.*)  \((.*)\)", line):
                parts.append(f"`{key[1]}` = `{key[2]}` <small>{_prose(key[3])}</small>\n")
            else:
                parts.append(f"{_prose(line.strip())}\n")
    return "\n".join(parts)


def _prose(text: str) -> str:
    """Text of a docstring with what Markdown would take for markup escaped, code in backticks aside."""
    parts = re.split("(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]<>|])", r"\\\1", part) for part in parts)


def commands_page() -> str:
    """What `deepgrpo COMMAND --help` prints."""
    from deepgrpo import cli

    parts = ["# Commands\n", _fenced((cli.__doc__ or "").partition("\n\n")[2], "text") + "\n"]
    for name in cli.COMMANDS:
        parts += [f"## deepgrpo {name}\n", _fenced(_help_of(cli.main, name), "text") + "\n"]
    return "\n".join(parts)


def _help_of(command: Callable[[list[str]], int], name: str) -> str:
    os.environ |= {"COLUMNS": "96", "NO_COLOR": "1", "TERM": "dumb"}
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        command([name, "--help"])
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


GENERATED = {"reference/keys.md": keys_page, "reference/commands.md": commands_page, "reference/api.md": api_page}


if __name__ == "__main__":
    main(sys.argv[1:])
