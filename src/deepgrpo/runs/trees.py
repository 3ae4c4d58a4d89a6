"""Saved trees: gzipped JSON lines, one tree with its credit per line, readable without this package.

    {"prompt": {...}, "nodes": [...], "pivots": [...], "credit": [...]}       keys as in records.py
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deepgrpo.errors import DataError
from deepgrpo.records import NO_PIVOT, ROOT, Credit, CreditSpan, Node, Pivot, Prompt, Tree
from deepgrpo.runs.files import replacing
from deepgrpo.runs.text import json_text, plain_json


@dataclass(frozen=True, slots=True)
class SavedTree:
    """A tree and the credit it was trained with.

    Example: SavedTree(step=10, number=3, tree=Tree(...), spans=(CreditSpan(node=0, start=0, end=6, ...), ...)).
    """

    step: int
    number: int
    """Position in the step's file, from 0."""
    tree: Tree
    spans: tuple[CreditSpan, ...]

    def advantages(self, node: int) -> list[CreditSpan]:
        """Credit of a node's own tokens, in the order of saving; empty for an untrained node."""
        return [span for span in self.spans if span.node == node]


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of the file."""

    prompt: Prompt
    nodes: tuple[Node, ...]
    pivots: tuple[Pivot, ...]
    credit: tuple[CreditSpan, ...]
    start: Any = None


_LINE = TypeAdapter(_Line)


def tree_to_json(tree: Tree, spans: Sequence[CreditSpan]) -> str:
    """A tree and its credit as one line of JSON. Values of `Prompt.columns` unknown to JSON become text or null."""
    # columns and messages apart: asdict copies them deeply, which not every value allows
    line = asdict(_Line(replace(tree.prompt, columns={}, messages=()), tree.nodes, tree.pivots, tuple(spans), tree.start))
    line["prompt"]["columns"] = plain_json(tree.prompt.columns)
    for node in line["nodes"]:
        if not node["score"]["parts"]:  # most rewards have none
            del node["score"]["parts"], node["score"]["outcome"]
        if not node["replies"]:  # no environment
            del node["replies"]
    if line["start"] is None:
        del line["start"]
    line["prompt"]["messages"] = plain_json(tree.prompt.messages)
    return json_text(line)


def tree_from_json(text: str) -> tuple[Tree, tuple[CreditSpan, ...]]:
    """Inverse of `tree_to_json`. Unknown keys, such as those of a later version, are ignored.

    Raises ValueError that names the first key that does not fit.
    """
    try:
        line = _LINE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
    return Tree(line.prompt, line.nodes, line.pivots, line.start), line.credit


def check_structure(tree: Tree, spans: Sequence[CreditSpan]) -> None:
    """Raise ValueError unless nodes, pivots and credit refer to each other as in a tree that was grown.

    A file that was tampered with could otherwise lead a reader astray, or in a circle.
    """

    def check(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{what} does not fit the tree")

    check(all(token >= 0 for token in tree.prompt.tokens), "prompt.tokens")
    lengths = [len(node.tokens) for node in tree.nodes]
    for number, node in enumerate(tree.nodes):
        where = f"nodes.{number}"
        check(ROOT <= node.parent < number, f"{where}.parent = {node.parent}")
        limit = lengths[node.parent] if node.parent != ROOT else 0
        check(0 <= node.offset <= limit, f"{where}.offset = {node.offset}")
        check((0 if node.sampled else NO_PIVOT) <= node.pivot < len(tree.pivots), f"{where}.pivot = {node.pivot}")
        check(all(0 <= token < 2**31 for token in node.tokens), f"{where}.tokens")
        check(len(node.logprobs) == lengths[number], f"{where}.logprobs")
        places = [0, *(place for reply in node.replies for place in (reply.start, reply.end)), lengths[number]]
        check(places == sorted(places), f"{where}.replies")
        score = node.score
        check(all(map(math.isfinite, (score.value, score.judged, *(p.value for p in score.parts.values())))), f"{where}.score")
    for number, pivot in enumerate(tree.pivots):
        where = f"pivots.{number}"
        check(ROOT <= pivot.parent < len(tree.nodes), f"{where}.parent = {pivot.parent}")
        check(0 <= pivot.offset <= (lengths[pivot.parent] if pivot.parent != ROOT else 0), f"{where}.offset = {pivot.offset}")
        check(0 <= pivot.ratio <= 1, f"{where}.ratio = {pivot.ratio}")
        check(len(pivot.q) in (0, len(pivot.candidates)), f"{where}.q")
        check(all(0 <= q <= 1 for q in pivot.q), f"{where}.q")
    for number, span in enumerate(spans):
        where = f"credit.{number}"
        check(0 <= span.node < len(tree.nodes), f"{where}.node = {span.node}")
        check(0 <= span.start <= span.end <= lengths[span.node], f"{where}.end = {span.end}")
        check(math.isfinite(span.advantage), f"{where}.advantage")


def save_trees(path: Path, trees: Sequence[Tree], credits: Sequence[Credit]) -> None:
    """Write the trees of a step with their credit: the whole file or none. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as aside, gzip.open(aside, "wt", encoding="utf-8", compresslevel=5) as file:
        for tree, credit in zip(trees, credits, strict=True):
            file.write(tree_to_json(tree, credit.spans) + "\n")


def load_saved(path: Path, step: int, *, check: bool = False) -> Iterator[SavedTree]:
    """Read the trees of a step one by one.

    Args:
        check: also check their structure (`check_structure`), for a reader that follows it.

    Raises DataError at a damaged line, after yielding the trees before it.
    """
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
            for number, text in enumerate(file):
                tree, spans = tree_from_json(text)
                if check:
                    check_structure(tree, spans)
                yield SavedTree(step, number, tree, spans)
    except ValueError as error:
        raise _damaged(path, f"tree {number}: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error


def load_trees(path: Path) -> Iterator[Tree]:
    """Read the trees of a step without their credit. Raises DataError at a damaged line."""
    return (saved.tree for saved in load_saved(path, 0))


def count_trees(path: Path) -> int:
    """Number of trees in a file, found by counting lines. Raises DataError if the file is damaged."""
    try:
        with gzip.open(path, "rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} cannot be read to its end ({why}); a run that was killed may leave such a file: delete it to do without "
        "the trees of this step"
    )
