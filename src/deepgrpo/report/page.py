"""One HTML file with everything in it: markup, styles, scripts and data. It asks for nothing over the network.

What a model has written is data, never markup: it stands in the page as JSON without a `<`, or as compressed base64, and the
scripts put it on the screen as text only. A content security policy names the one script and the one style that may
run, by their hashes, and forbids every connection.
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
"""In the order they are run, as one script."""
_ASSETS = files("deepgrpo.report") / "assets"


def write_page(path: Path, title: str, data: Any, blocks: Iterable[tuple[str, str]]) -> int:
    """Write the page and return its size in bytes. It is written aside and renamed: there is never half a page.

    Args:
        path: where to.
        title: heading; any text.
        data: what is there at once; JSON.
        blocks: (name, base64) of what is opened later, written as they come.

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
    """The page in pieces."""
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
    r"""JSON that may stand in a script element: ASCII, and no character that HTML looks at.

    >>> safe_json("</script>")
    '"\\u003c/script\\u003e"'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _clean(text: str) -> str:
    """No control characters, and no halves of characters that UTF-8 cannot write."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text).encode("utf-8", "replace").decode()


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _hash(text: str) -> str:
    """A source expression of a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
