"""One self-contained HTML file: markup, styles, scripts and data. It makes no network requests.

Model output is data, never markup: the page holds it as JSON without `<`, or as compressed base64, and the scripts display
it as text only. A content security policy admits the one script and the one style by their hashes and forbids every
connection.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

SCRIPTS = ("dom.js", "format.js", "chart.js", "heat.js", "curves.js", "pivots.js", "store.js", "list.js", "tree.js", "main.js")
"""Concatenated in this order into one script."""
_ASSETS = files("deepgrpo.report") / "assets"


def write_page(path: Path, title: str, data: Any, blocks: Iterable[tuple[str, str]]) -> int:
    """Write the page and return its size in bytes. A temporary file is renamed, so a half-written page never appears.

    Args:
        path: file to write.
        title: heading; any text.
        data: JSON decoded with the page.
        blocks: (name, base64) pairs decoded on demand, written as they arrive.

    Raises OSError.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            for part in page_parts(title, data, blocks):
                file.write(part)
        size = aside.stat().st_size
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    return size


def page_parts(title: str, data: Any, blocks: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The page as consecutive strings."""
    style = _asset("page.css")
    script = '"use strict";\n(() => {\n' + "\n".join(_asset(name) for name in SCRIPTS) + "\n})();\n"
    before, after = _asset("page.html").split("<!-- data -->")
    yield Template(before).substitute(
        title=html.escape(_clean(title)), style=style, style_hash=_hash(style), script_hash=_hash(script)
    )
    yield f'<script type="application/json" id="data">{safe_json(data)}</script>\n'
    for name, text in blocks:
        yield f'<script type="text/plain" id="{html.escape(name)}">{text}</script>\n'
    yield f"<script>{script}</script>"
    yield after


def safe_json(value: Any) -> str:
    r"""JSON that is safe inside a script element: ASCII without HTML's special characters.

    >>> safe_json("</script>")
    '"\\u003c/script\\u003e"'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _clean(text: str) -> str:
    """Replace control characters and lone surrogates, which UTF-8 cannot encode."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text).encode("utf-8", "replace").decode()


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _hash(text: str) -> str:
    """A hash source of the content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
