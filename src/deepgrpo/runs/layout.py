"""Names of everything directly in a run directory; each is spelled here and nowhere else.

    RUN/config.toml                    resolved recipe
    RUN/place.json                     where the run is, and where its relative paths begin (moved.py)
    RUN/metrics.jsonl                  one JSON object per step (metrics.py)
    RUN/log.txt                        the lines shown in the terminal, with timestamps
    RUN/start/                         weights after the warm start, in Hugging Face layout
    RUN/checkpoints/step-000010/       one checkpoint; checkpoints.py owns what is in it
    RUN/trees/step-000010.jsonl.gz     trees of a step, one per line (trees.py)
    RUN/eval/step-000010.jsonl         answers of an evaluation, one per line
    RUN/report.html                    page written by `deepgrpo report`
    RUN/export/                        the model written by `deepgrpo export`
    RUN/final.json                     accuracy on held-back questions, written by `deepgrpo compare`
    RUN/tensorboard/, RUN/wandb-id.txt  files of the optional sinks
    RUN/.lock                          held while a process trains there (lock.py)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from deepgrpo.config import RunConfig

START = "start"
"""Directory of the start model; users name it in `warmstart.from` and `deepgrpo probe RUN/start`."""

_STEP = re.compile(r"step-([0-9]{6,})")
_TREES, _ROWS = ".jsonl.gz", ".jsonl"


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths inside a run directory; nothing is read or created.

    Example: RunDir(Path("runs/demo")).trees(10) is runs/demo/trees/step-000010.jsonl.gz.
    """

    path: Path

    @classmethod
    def of(cls, run: RunConfig) -> RunDir:
        """The directory that a recipe's [run] names."""
        return cls(Path(run.dir) / run.name)

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def place(self) -> Path:
        return self.path / "place.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def start(self) -> Path:
        """Start model: weights after the warm start and reference of the KL term."""
        return self.path / START

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_name(step)

    @property
    def tree_folder(self) -> Path:
        return self.path / "trees"

    def trees(self, step: int) -> Path:
        return self.tree_folder / f"{step_name(step)}{_TREES}"

    def tree_files(self) -> dict[int, Path]:
        """Step → file of its saved trees, ascending; empty for a run without trees."""
        return _by_step(self.tree_folder, _TREES)

    @property
    def eval_folder(self) -> Path:
        return self.path / "eval"

    def eval(self, step: int) -> Path:
        return self.eval_folder / f"{step_name(step)}{_ROWS}"

    def eval_files(self) -> dict[int, Path]:
        """Step → file of the answers of its evaluation, ascending."""
        return _by_step(self.eval_folder, _ROWS)

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def final(self) -> Path:
        return self.path / "final.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def wandb_id(self) -> Path:
        return self.path / "wandb-id.txt"

    def has_recipe(self) -> bool:
        return self.config.is_file()

    def has_metrics(self) -> bool:
        return self.metrics.is_file()


def shown(path: Path) -> Path:
    """A path for a message: from the working directory if it lies below it."""
    try:
        below = path.relative_to(Path.cwd())
    except (ValueError, OSError):  # elsewhere, given relative, or no working directory any more
        return path
    return below if below.parts else path


def step_name(step: int) -> str:
    """`step-000010` for step 10."""
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    """The step in `step-000010`; None for any other name, such as that of a checkpoint still being written."""
    match = _STEP.fullmatch(name)
    step = int(match.group(1)) if match else None
    return step if step is not None and step_name(step) == name else None


def _by_step(folder: Path, ending: str) -> dict[int, Path]:
    found = {step_of(path.name.removesuffix(ending)): path for path in folder.glob(f"*{ending}")}
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


def run_around(path: Path) -> RunDir | None:
    """The run that holds a checkpoint directory or its `model` directory; None for any other path."""
    for run in (RunDir(path.parent.parent), RunDir(path.parent.parent.parent)):
        if path.is_dir() and run.checkpoints.name in path.parts and run.has_recipe():
            return run
    return None
