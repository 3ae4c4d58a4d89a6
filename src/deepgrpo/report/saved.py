"""What a run has left on disk: recipe, metrics, trees. Only the run directory is read.

    RUN/config.toml                     the resolved recipe
    RUN/metrics.jsonl                   one object per step
    RUN/trees/step-000010.jsonl.gz      the trees of a step, one a line (`log.trees_every`)
"""

from __future__ import annotations

import gzip
import json
import re
import tomllib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from deepgrpo.errors import DataError
from deepgrpo.records import CreditSpan, Node, Pivot, Prompt, Score, Tree

_TREES = re.compile(r"^step-(\d{6,})\.jsonl\.gz$")
T = TypeVar("T")
_KEYS: dict[type, frozenset[str]] = {
    kind: frozenset(f.name for f in fields(kind)) for kind in (Prompt, Node, Score, Pivot, CreditSpan)
}


@dataclass(frozen=True, slots=True)
class SavedTree:
    """A tree with the credit it was trained by.

    Example: SavedTree(step=10, number=3, tree=Tree(...), spans=(CreditSpan(node=0, start=0, end=6, ...), ...)).
    """

    step: int
    number: int
    """Place in the file of the step, from 0."""
    tree: Tree
    spans: tuple[CreditSpan, ...]

    def advantages(self, node: int) -> list[CreditSpan]:
        """The credit of a node's own tokens, in the order it was given; empty if it was not trained."""
        return [span for span in self.spans if span.node == node]


class SavedRun:
    """A run directory, read as its parts are asked for."""

    def __init__(self, directory: Path) -> None:
        """Raises DataError if this is no run directory."""
        self.directory = directory
        if not directory.exists():
            raise DataError(f"{str(directory)!r} does not exist; name the directory of a run, e.g. runs/demo")
        if not (directory / "config.toml").is_file() or not (directory / "metrics.jsonl").is_file():
            raise DataError(f"{str(directory)!r} is not a run directory: {_what_is_missing(directory)}")

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @cached_property
    def recipe(self) -> str:
        """The resolved recipe as it stands in config.toml."""
        return (self.directory / "config.toml").read_text(encoding="utf-8", errors="replace")

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The recipe as plain tables. Not checked: an older run may have keys that are no longer known."""
        try:
            return tomllib.loads(self.recipe)
        except tomllib.TOMLDecodeError as error:
            raise DataError(f"{self.directory / 'config.toml'} cannot be read: {error}") from error

    def section(self, name: str) -> Mapping[str, Any]:
        found = self.config.get(name, {})
        return found if isinstance(found, dict) else {}

    @property
    def success_threshold(self) -> float:
        """Rewards above it are successes."""
        return float(self.section("explore").get("success_threshold", 0.0))

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl by step; a line torn by a kill is left out."""
        found: dict[int, dict[str, Any]] = {}
        with (self.directory / "metrics.jsonl").open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    each = json.loads(line)
                    found[int(each["step"])] = each
                except (ValueError, KeyError, TypeError):
                    continue
        return [found[step] for step in sorted(found)]

    @cached_property
    def tree_files(self) -> dict[int, Path]:
        """Step → file, ascending; empty for a run without trees."""
        folder = self.directory / "trees"
        matches = [(match, path) for path in folder.glob("*.gz") if (match := _TREES.match(path.name))]
        return dict(sorted((int(match.group(1)), path) for match, path in matches))

    def count_trees(self, step: int) -> int:
        """Trees in the file of a step, without reading them. Raises DataError if the file is damaged."""
        path = self.tree_files[step]
        try:
            with gzip.open(path, "rb") as file:
                return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, error) from error

    def trees(self, step: int) -> Iterator[SavedTree]:
        """The trees of a step, one by one.

        Raises DataError if the file is damaged; the trees before the damage have been yielded by then.
        """
        path = self.tree_files[step]
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                for number, line in enumerate(file):
                    raw = json.loads(line)
                    yield SavedTree(step, number, _tree(raw), tuple(_record(CreditSpan, s) for s in raw.get("credit", ())))
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from error

    def why_no_trees(self) -> str:
        """Why a run has no trees, and what to do about it."""
        every = self.section("log").get("trees_every")
        if not isinstance(every, int):  # absent, or the word "none"
            return (
                f"{self.directory} has no saved trees: log.trees_every is not set in its recipe; "
                "run it with --log.trees_every 10 to keep those of every tenth step"
            )
        last = self.metrics[-1]["step"] if self.metrics else 0
        if last >= every:
            return (
                f"{self.directory} has no saved trees, although log.trees_every is {every} and the run is at step {last}: "
                f"{self.directory / 'trees'} is not there or empty; copy it from where the run was made"
            )
        return (
            f"{self.directory} has no saved trees yet: log.trees_every is {every} and the run is at step {last}; "
            "lower it with --log.trees_every 1, or wait"
        )


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read to its end ({error}); a run that was killed may leave such a file: delete it to do without "
        "the trees of this step"
    )


def _what_is_missing(directory: Path) -> str:
    if not directory.is_dir():
        return "it is a file; name the directory that holds config.toml and metrics.jsonl"
    inside = sorted(path.parent.name for path in directory.glob("*/metrics.jsonl"))
    if inside:
        return f"it holds the runs {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}; name one of them"
    if (directory / "config.toml").is_file():
        return "it has a config.toml but no metrics.jsonl, so no step has been taken yet"
    for parent in directory.resolve().parents:
        if (parent / "config.toml").is_file() and (parent / "metrics.jsonl").is_file():
            return f"it lies inside of one; name {parent}"
    return "it has no config.toml; name the directory of a run, e.g. runs/demo"


def _tree(raw: Mapping[str, Any]) -> Tree:
    # columns may hold anything, and nothing here reads them
    prompt = _record(Prompt, {**raw["prompt"], "tokens": tuple(raw["prompt"]["tokens"]), "columns": {}})
    nodes = [
        _record(
            Node,
            {
                **node, "tokens": tuple(node["tokens"]), "logprobs": tuple(node["logprobs"]),
                "score": _record(Score, node["score"]), "signals": {},
            },
        )
        for node in raw["nodes"]
    ]  # fmt: skip
    pivots = [
        _record(Pivot, {**pivot, "candidates": tuple(pivot.get("candidates", ())), "q": tuple(pivot.get("q", ()))})
        for pivot in raw["pivots"]
    ]
    return Tree(prompt, tuple(nodes), tuple(pivots))


def _record(kind: type[T], raw: Mapping[str, Any]) -> T:
    """A record from a dictionary; keys of a later version are passed over."""
    known = _KEYS[kind]
    return kind(**{key: value for key, value in raw.items() if key in known})


def nearest(wanted: int, steps: Sequence[int], count: int = 4) -> list[int]:
    """The steps next to `wanted`, ascending. Example: 10 and 20 are the two next to 12 in [1, 10, 20, 30]."""
    return sorted(sorted(steps, key=lambda step: (abs(step - wanted), step))[:count])
