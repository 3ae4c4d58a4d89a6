"""Notebooks, run cell by cell in this process: a kernel of its own would import torch again.

`python tests/notebooks.py` runs those of `examples/` and records their outputs: text, and HTML of data frames.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Output = dict[str, Any]


def run_notebook(path: Path, replace: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], list[list[Output]]]:
    """Run all code cells in one namespace. Returns the namespace, and the outputs of each code cell in nbformat's form.

    Args:
        replace: values that names get once a cell has set them, such as fewer steps.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, start=1):
        outputs.append(_run_cell("".join(cell["source"]), names, f"{path.name}, code cell {number}", number))
        names |= {name: value for name, value in (replace or {}).items() if name in names}
    return names, outputs


def _run_cell(source: str, names: dict[str, Any], place: str, number: int) -> list[Output]:
    body = ast.parse(source, place).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    shown = io.StringIO()
    value = None
    with contextlib.redirect_stdout(shown):
        exec(compile(ast.Module(body, []), place, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), place, "eval"), names)
    found: list[Output] = []
    if shown.getvalue():
        found.append({"name": "stdout", "output_type": "stream", "text": shown.getvalue().splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        if html := getattr(value, "_repr_html_", lambda: None)():
            data["text/html"] = html.splitlines(keepends=True)
        found.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return found


def record(path: Path) -> None:
    """Write the outputs of a run into a notebook."""
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        _, outputs = run_notebook(path)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, found) in enumerate(zip(cells, outputs, strict=True), start=1):
        cell["outputs"], cell["execution_count"] = found, number
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    for each in sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb")):
        record(each)
