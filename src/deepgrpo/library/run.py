"""A run that has been trained: its directory, metrics, trees, checkpoints and final evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deepgrpo.errors import DataError
from deepgrpo.runs.checkpoints import Checkpoint, newest_checkpoint
from deepgrpo.runs.saved import SavedRun

_EVAL = "eval/"


class Run(SavedRun):
    """A run on disk. `Run(path)` opens the directory of any run; `train` returns one.

    Example: `run.metrics[-1]["main/reward"]`, `run.evaluation["greedy"]`, `list(run.trees(10))`, `run.model`.
    """

    def __init__(self, directory: str | Path) -> None:
        """Raises DataError if this is not a run directory."""
        super().__init__(Path(directory).expanduser())

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r}, step {self.step})"

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def evaluation(self) -> Mapping[str, float] | None:
        """Figures of the last evaluation without their prefix, and its step; None without an evaluation.

        Example: {"step": 60, "greedy": 0.97, "greedy_se": 0.01, "length": 38.2, ...}.
        """
        line = next((each for each in reversed(self.metrics) if each.get(f"{_EVAL}greedy") is not None), None)
        if line is None:
            return None
        figures = {key.removeprefix(_EVAL): value for key, value in line.items() if key.startswith(_EVAL)}
        return {"step": line["step"], **figures}

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint."""
        return newest_checkpoint(self.paths)

    @property
    def model(self) -> Path:
        """Directory of the newest checkpoint's model and tokenizer, in the layout of transformers.

        Raises DataError if there is no checkpoint.
        """
        newest = self.checkpoint
        if newest is None:
            raise DataError(f"{self.directory} has no checkpoint yet, so it has no model; let it take a step")
        return newest.model


def as_run(run: str | Path | SavedRun) -> Run:
    """The run of a path, or of a run that is open already."""
    if isinstance(run, Run):
        return run
    return Run(run.directory if isinstance(run, SavedRun) else run)
