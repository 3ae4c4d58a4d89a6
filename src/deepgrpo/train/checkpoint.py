"""Checkpoints: whole or not there.

    checkpoints/step-000010/
        model/                  Hugging Face layout (safetensors, config, tokenizer)
        optimizer.safetensors   first and second moments by parameter name, and torch's random state
                                (a directory `optimizer` where several learners hold a shard each, see moments.py)
        state.json              step, data cursor, strategy state, ledger, best evaluation

A checkpoint is written into `.tmp-step-000010`, flushed to disk and renamed; a crash or a full disk leaves nothing that
looks like a checkpoint, and never touches an earlier one. Nothing is unpickled but the table of contents of sharded moments.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from deepgrpo.errors import CheckpointError
from deepgrpo.model.policy import Policy
from deepgrpo.records import Ledger
from deepgrpo.train.backend import UpdatesPolicy

_NAME = re.compile(r"^step-(\d{6,})$")


@dataclass(frozen=True, slots=True)
class TrainState:
    """Everything besides weights and moments that a run needs to go on as if it had never stopped."""

    step: int = 0
    """Training steps done."""
    optimizer_steps: int = 0
    cursor: Mapping[str, Any] = field(default_factory=dict)
    """Place in the data."""
    strategy: Mapping[str, Any] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    health: Mapping[str, Any] = field(default_factory=dict)
    """What the warnings remember."""
    first_value: float | None = None
    """Greedy accuracy of the first, the last and the best evaluation."""
    last_value: float | None = None
    best_value: float | None = None
    best_step: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainState:
        raw = json.loads(text)
        return cls(**{**raw, "ledger": Ledger(**raw["ledger"])})


class Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, directory: Path, *, keep_last: int = 2, keep_best: bool = True) -> None:
        self.directory, self.keep_last, self.keep_best = directory, keep_last, keep_best

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        matches = (_NAME.match(path.name) for path in self.directory.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def save(self, policy: Policy, learner: UpdatesPolicy, state: TrainState) -> Path:
        """Write a checkpoint and delete those that are no longer kept.

        Raises CheckpointError if it cannot be written (a full disk, no permission); earlier ones are then untouched.
        """
        final = self.path(state.step)
        aside = self.directory / f".tmp-{final.name}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / "model").mkdir(parents=True)
            policy.save(aside / "model")
            learner.save(aside)
            (aside / "state.json").write_text(state.to_json())
            for file in [*aside.rglob("*"), aside]:
                _flush(file)
            shutil.rmtree(final, ignore_errors=True)  # only there if the same step is saved again
            aside.rename(final)
            _flush(self.directory)
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            # safetensors wraps what the system says of a full disk in its own error
            if not isinstance(error, OSError | SafetensorError):
                raise
            earlier = self.steps()
            remedy = f"Earlier checkpoints {earlier} are whole; free some space and continue with --resume"
            if not earlier:
                remedy = "There is no earlier one: free some space and start the run anew"
            raise CheckpointError(
                f"the checkpoint of step {state.step} could not be written to {self.directory}: {error}. {remedy}"
            ) from error
        self._forget(state)
        return final

    def load(self, policy: Policy, learner: UpdatesPolicy, step: int | None = None) -> TrainState:
        """Put weights and moments back in place; returns the state. `step` None: the newest.

        Raises CheckpointError if there is none, or it does not fit the recipe.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.directory} holds no checkpoint to resume from; start the run anew")
        path = self.path(steps[-1] if step is None else step)
        try:
            policy.load_weights(path / "model")
            state = TrainState.from_json((path / "state.json").read_text())
            learner.load(path, state.optimizer_steps)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint {path} cannot be read: {error}; delete that directory to continue from the one before"
            ) from error
        return state

    def _forget(self, state: TrainState) -> None:
        kept = set(self.steps()[-self.keep_last :])
        if self.keep_best and state.best_step is not None:
            kept.add(state.best_step)
        for step in self.steps():
            if step not in kept:
                shutil.rmtree(self.path(step))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
