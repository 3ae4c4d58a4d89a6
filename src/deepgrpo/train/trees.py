"""Grown trees on disk: gzipped JSON lines, one tree a line, readable without this package."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepgrpo.records import Credit, Node, Pivot, Prompt, Score, Tree


def save_trees(path: Path, trees: Sequence[Tree], credits: Sequence[Credit]) -> None:
    """Write trees and their credit. Values of a row that JSON does not know are written as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=5) as file:
        for tree, credit in zip(trees, credits, strict=True):
            record = asdict(tree) | {"credit": [asdict(span) for span in credit.spans]}
            file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")


def load_trees(path: Path) -> Iterator[Tree]:
    """Read trees one by one."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield _tree(json.loads(line))


def _tree(raw: dict[str, Any]) -> Tree:
    prompt = Prompt(**{**raw["prompt"], "tokens": tuple(raw["prompt"]["tokens"])})
    nodes = tuple(
        Node(
            **{
                **node,
                "tokens": tuple(node["tokens"]),
                "logprobs": tuple(node["logprobs"]),
                "score": Score(**node["score"]),
                # trees that were saved before there were signals have none
                "signals": {name: tuple(values) for name, values in node.get("signals", {}).items()},
            }
        )
        for node in raw["nodes"]
    )
    pivots = tuple(
        Pivot(**{**pivot, "candidates": tuple(pivot["candidates"]), "q": tuple(pivot["q"])}) for pivot in raw["pivots"]
    )
    return Tree(prompt, nodes, pivots)
