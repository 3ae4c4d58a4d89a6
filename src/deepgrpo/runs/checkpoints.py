"""Checkpoints on disk: names, the state file, and which one is the newest. Weights and moments: train/checkpoint.py.

    checkpoints/step-000010/
        model/                  Hugging Face layout (safetensors, config, tokenizer)
        optimizer.safetensors   moments of AdamW by parameter name, and torch's random state
                                (a directory `optimizer` with sharded learners, see train/moments.py)
        state.json              TrainState

A checkpoint is renamed into place once it is complete, so every directory listed here is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deepgrpo.errors import CheckpointError
from deepgrpo.records import Ledger
from deepgrpo.runs.layout import RunDir, step_of


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
