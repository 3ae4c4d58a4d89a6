"""Saving and loading checkpoints. The layout and the state file are described in runs/checkpoints.py.

A checkpoint is written into `.tmp-step-000010`, flushed to disk and renamed: a crash or a full disk leaves nothing that
looks like a checkpoint and never touches an earlier one. Only the index of sharded moments is unpickled.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError

from deepgrpo.errors import CheckpointError
from deepgrpo.model.policy import Policy
from deepgrpo.runs.checkpoints import Checkpoint, TrainState, newest_checkpoint, saved_checkpoints, unreadable
from deepgrpo.runs.files import flush_to_disk
from deepgrpo.runs.layout import RunDir
from deepgrpo.train.backend import UpdatesPolicy


class Checkpoints:
    """The checkpoints of a run: saves, loads, and deletes old ones."""

    def __init__(self, run: RunDir, *, keep_last: int = 2, keep_best: bool = True) -> None:
        self.run, self.keep_last, self.keep_best = run, keep_last, keep_best

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return [each.step for each in saved_checkpoints(self.run)]

    def save(self, policy: Policy, learner: UpdatesPolicy, state: TrainState) -> Path:
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

    def load(self, policy: Policy, learner: UpdatesPolicy) -> TrainState:
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
