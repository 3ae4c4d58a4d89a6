"""Checkpoints on disk: `checkpoints/` of a run directory, its layout, its state file, saving, loading and deleting.

    checkpoints/step-000010/
        model/                  Hugging Face layout (safetensors, config, tokenizer)
        optimizer.safetensors   moments of AdamW by parameter name, and torch's random state
                                (a directory `optimizer` with sharded learners, see train/moments.py)
        state.json              TrainState

A checkpoint is written into `.tmp-step-000010`, flushed to disk and renamed, so every directory listed here is whole: a crash
or a full disk leaves nothing that looks like a checkpoint and never touches an earlier one. The policy and the learner write
their own files into the directory they are given.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from deepgrpo.errors import CheckpointError
from deepgrpo.records import Ledger
from deepgrpo.runs.files import flush_to_disk
from deepgrpo.runs.layout import RunDir, step_of


class SavesWeights(Protocol):
    """A policy (model/policy.py)."""

    def save(self, directory: Path) -> None: ...

    def load_weights(self, directory: Path) -> None: ...


class SavesMoments(Protocol):
    """A learner (train/learner.py, cluster/learners.py)."""

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path, optimizer_steps: int) -> None: ...


@dataclass(frozen=True, slots=True)
class TrainState:
    """Everything besides weights and moments that a run needs to continue as if it had never stopped."""

    step: int = 0
    """Training steps done."""
    optimizer_steps: int = 0
    cursor: Mapping[str, Any] = field(default_factory=dict)
    """Position in the data."""
    strategy: Mapping[str, Any] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    health: Mapping[str, Any] = field(default_factory=dict)
    """State of the health warnings."""
    first_value: float | None = None
    """Greedy accuracy of the first evaluation."""
    last_value: float | None = None
    best_value: float | None = None
    best_step: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    """Section → fingerprint of its prompts (prompts/fingerprint.py)."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainState:
        raw = json.loads(text)
        return cls(**{**raw, "ledger": Ledger(**raw["ledger"])})


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Paths of one checkpoint. Example: Checkpoint(step=10, path=Path("runs/demo/checkpoints/step-000010"))."""

    step: int
    path: Path

    @property
    def model(self) -> Path:
        return model_in(self.path)

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    def read_state(self) -> TrainState:
        """The saved state. Raises CheckpointError if it cannot be read."""
        try:
            return TrainState.from_json(self.state_file.read_text(encoding="utf-8"))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise unreadable(self.path, error) from error


def saved_checkpoints(run: RunDir) -> list[Checkpoint]:
    """The complete checkpoints of a run, ascending by step."""
    if not run.checkpoints.is_dir():
        return []
    steps = (step_of(path.name) for path in run.checkpoints.iterdir())
    return [Checkpoint(step, run.checkpoint(step)) for step in sorted(step for step in steps if step is not None)]


def newest_checkpoint(run: RunDir) -> Checkpoint | None:
    return next(iter(saved_checkpoints(run)[::-1]), None)


def model_in(checkpoint: Path) -> Path:
    """The model directory of a checkpoint."""
    return checkpoint / "model"


def unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {path} cannot be read: {error}; delete that directory to continue from the one before"
    )


class Checkpoints:
    """The checkpoints of a run: saves, loads, and deletes old ones."""

    def __init__(self, run: RunDir, *, keep_last: int = 2, keep_best: bool = True) -> None:
        self.run, self.keep_last, self.keep_best = run, keep_last, keep_best

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [each.step for each in saved_checkpoints(self.run)]

    def save(self, policy: SavesWeights, learner: SavesMoments, state: TrainState) -> Path:
        """Write a checkpoint and delete those that are no longer kept.

        Raises CheckpointError if it cannot be written (a full disk, no permission); earlier ones are then untouched.
        """
        folder = self.run.checkpoints
        final = Checkpoint(state.step, self.run.checkpoint(state.step))
        aside = Checkpoint(state.step, folder / f".tmp-{final.path.name}")
        try:
            shutil.rmtree(aside.path, ignore_errors=True)
            aside.model.mkdir(parents=True)
            policy.save(aside.model)
            learner.save(aside.path)
            aside.state_file.write_text(state.to_json())
            for file in [*aside.path.rglob("*"), aside.path]:
                flush_to_disk(file)
            shutil.rmtree(final.path, ignore_errors=True)  # present only if the same step is saved again
            aside.path.rename(final.path)
            flush_to_disk(folder)
        except Exception as error:
            shutil.rmtree(aside.path, ignore_errors=True)
            # safetensors wraps the system's message about a full disk in its own error
            if not isinstance(error, OSError | SafetensorError):
                raise
            earlier = self.steps()
            remedy = f"Earlier checkpoints {earlier} are whole; free some space and continue with --resume"
            if not earlier:
                remedy = "There is no earlier one: free some space and start the run anew"
            raise CheckpointError(
                f"the checkpoint of step {state.step} could not be written to {folder}: {error}. {remedy}"
            ) from error
        self._delete_old(state)
        return final.path

    def load(self, policy: SavesWeights, learner: SavesMoments) -> TrainState:
        """Restore weights and moments of the newest checkpoint; returns the state.

        Raises CheckpointError if there is none, or if it does not fit the recipe.
        """
        found = newest_checkpoint(self.run)
        if found is None:
            raise CheckpointError(f"{self.run.checkpoints} holds no checkpoint to resume from; start the run anew")
        try:
            policy.load_weights(found.model)
            state = found.read_state()
            learner.load(found.path, state.optimizer_steps)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise unreadable(found.path, error) from error
        return state

    def _delete_old(self, state: TrainState) -> None:
        kept = set(self.steps()[-self.keep_last :])
        if self.keep_best and state.best_step is not None:
            kept.add(state.best_step)
        for step in self.steps():
            if step not in kept:
                shutil.rmtree(self.run.checkpoint(step))
