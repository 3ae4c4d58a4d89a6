"""A run directory read back: recipe, metrics, trees."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from deepgrpo.errors import DataError
from deepgrpo.runs.files import remedy
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.metrics import read_metrics
from deepgrpo.runs.trees import SavedTree, count_trees, load_saved


class SavedRun:
    """A run directory whose parts are read on first use."""

    def __init__(self, directory: Path) -> None:
        """Raises DataError if this is not a run directory."""
        self.directory, self.paths = directory, RunDir(directory)
        try:
            there = directory.exists()
        except OSError as error:
            raise unreadable(directory, error) from error
        if not there:
            raise DataError(f"{str(directory)!r} does not exist; name the directory of a run, e.g. runs/demo")
        if not self.paths.has_recipe() or not self.paths.has_metrics():
            raise DataError(f"{str(directory)!r} is not a run directory: {_what_is_missing(self.paths)}")

    def __fspath__(self) -> str:
        return str(self.directory)

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @cached_property
    def recipe(self) -> str:
        """Text of config.toml."""
        try:
            return self.paths.config.read_text(encoding="utf-8-sig", errors="replace")
        except OSError as error:
            raise unreadable(self.paths.config, error) from error

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The recipe as plain tables, unchecked: an older run may have keys that no longer exist."""
        try:
            return tomllib.loads(self.recipe)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise DataError(f"{self.paths.config} cannot be read: {why}; put back the recipe of the run") from error

    def section(self, name: str) -> Mapping[str, Any]:
        found = self.config.get(name, {})
        return found if isinstance(found, dict) else {}

    @property
    def success_threshold(self) -> float:
        """Rewards above it are successes."""
        found = self.section("explore").get("success_threshold", 0.0)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise DataError(
                f"{self.paths.config}: explore.success_threshold is {found!r}, but it should be a number; correct it there"
            )
        return float(found)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl by step."""
        try:
            return read_metrics(self.paths.metrics)
        except OSError as error:
            raise unreadable(self.paths.metrics, error) from error

    def is_finished(self) -> bool:
        """True if the run has taken all steps or passes over the data, or sampled as many tokens as it may."""
        if not self.metrics:
            return False
        last, run = self.metrics[-1], self.section("run")
        limits = {"step": "steps", "data/epochs": "epochs", "ledger/sampled_tokens": "max_sampled_tokens"}
        pairs = [(last.get(metric), run.get(key)) for metric, key in limits.items()]
        return any(isinstance(most, int) and isinstance(reached, int | float) and reached >= most for reached, most in pairs)

    @cached_property
    def tree_files(self) -> dict[int, Path]:
        """Step → file of its trees, ascending; empty for a run without trees."""
        return self.paths.tree_files()

    def count_trees(self, step: int) -> int:
        """Number of trees saved at a step. Raises DataError if the file is damaged."""
        return count_trees(self.tree_files[step])

    def trees(self, step: int) -> Iterator[SavedTree]:
        """The trees of a step, one by one. Raises DataError at a damaged line, after yielding the trees before it."""
        return load_saved(self.tree_files[step], step, check=True)

    def why_no_trees(self) -> str:
        """The reason why a run has no saved trees, and the remedy."""
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
                f"{self.paths.tree_folder} is missing or empty; copy it from where the run was made"
            )
        if self.is_finished():
            return (
                f"{self.directory} has no saved trees: log.trees_every is {every}, and the run ended with step {last}; "
                "run it again under another name with --log.trees_every 1"
            )
        return (
            f"{self.directory} has no saved trees yet: log.trees_every is {every} and the run is at step {last}; "
            "lower it with --log.trees_every 1, or wait"
        )


def unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror or error}; {remedy(error)}")


def _what_is_missing(run: RunDir) -> str:
    needed = f"{run.config.name} and {run.metrics.name}"
    if not run.path.is_dir():
        return f"it is a file; name the directory that holds {needed}"
    inside = sorted(path.name for path in run.path.iterdir() if RunDir(path).has_metrics())
    if inside:
        return f"it holds the runs {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}; name one of them"
    if run.has_recipe():
        return f"it has a {run.config.name} but no {run.metrics.name}, so no step has been taken yet"
    for parent in map(RunDir, run.path.resolve().parents):
        if parent.has_recipe() and parent.has_metrics():
            return f"it is inside one; name {parent.path}"
    return f"it has no {run.config.name}; name the directory of a run, e.g. runs/demo"


def nearest(wanted: int, steps: Sequence[int], count: int = 4) -> list[int]:
    """The steps closest to `wanted`, ascending. Example: 10 and 20 are the two closest to 12 in [1, 10, 20, 30]."""
    return sorted(sorted(steps, key=lambda step: (abs(step - wanted), step))[:count])
