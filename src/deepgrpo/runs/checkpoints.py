"""Checkpoints on disk: what a directory of `checkpoints/` holds (layout.py names it), saving, loading and deleting.

    checkpoints/step-000010/
        model/                  Hugging Face layout (safetensors, config, tokenizer)
        optimizer.safetensors   moments of AdamW by parameter name, and torch's random state
                                (a directory `optimizer` with sharded learners, see train/moments.py)
        state.json              TrainState, with the checksums of all other files and of itself (state_file.py)

The order of writes: 1. the weights, then the moments, into `.tmp-step-000010`; 2. their checksums and the state; 3. every file
and directory is flushed to disk; 4. `.tmp-step-000010` is renamed and the rename is flushed; 5. checkpoints that are no longer
kept are renamed to `.old-step-...` and deleted. A kill or a full disk at any point leaves every directory under its final name
whole, and never touches an earlier one; the next start deletes `.tmp-...` and `.old-...`. The policy and the learner write
their own files into the directory they are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from deepgrpo.errors import CheckpointError
from deepgrpo.ledger import Ledger
from deepgrpo.runs.checksums import Checksums, changed_files, checksums
from deepgrpo.runs.files import WRITING, delete_leftovers, delete_tree, flush_to_disk, remedy
from deepgrpo.runs.layout import RunDir, shown, step_of
from deepgrpo.runs.resume import resume_command
from deepgrpo.runs.state_file import check_count, check_keys, check_number, check_table, read_sealed, sealed


class SavesWeights(Protocol):
    """A policy (model/policy.py)."""

    def save(self, directory: Path) -> None: ...

    def load_weights(self, directory: Path) -> None: ...


class SavesMoments(Protocol):
    """A learner (train/learner.py, cluster/learners.py)."""

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path, updates: int, optimizer_steps: int) -> None: ...


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
    last_step: int | None = None
    """Step of the last evaluation."""
    best_value: float | None = None
    best_step: int | None = None
    start_weights: str = ""
    """Fingerprint of the weights before the first step, from which the KL reference is made (train/start.py)."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Section → fingerprint of its prompts (prompts/fingerprint.py)."""
    curriculum: Mapping[str, Any] = field(default_factory=dict)
    """Memory of the curriculum (prompts/curriculum.py)."""

    def to_json(self, files: Checksums | None = None) -> str:
        """The text of a state file, with the checksums of the checkpoint's other files."""
        return sealed(asdict(self), files or {})

    @classmethod
    def from_raw(cls, raw: Mapping[str, Any]) -> TrainState:
        """A state from its JSON values. Raises ValueError that names the first field that is missing, unknown or impossible."""
        check_keys(raw, [each.name for each in fields(cls)])
        for name in ("step", "optimizer_steps"):
            check_count(raw[name], name)
        for name in ("cursor", "strategy", "health", "data", "curriculum"):
            check_table(raw[name], name)
        check_table(raw["ledger"], "ledger")
        check_keys(raw["ledger"], [each.name for each in fields(Ledger)], "ledger.")
        for each in fields(Ledger):
            check = check_number if each.name.startswith("seconds_") else check_count
            check(raw["ledger"][each.name], f"ledger.{each.name}")
        _check_cursor(raw["cursor"], "cursor")
        for name in ("first_value", "last_value", "best_value"):
            if raw[name] is not None:
                check_number(raw[name], name, lowest=None)
        for name in ("last_step", "best_step"):
            if raw[name] is not None:
                check_count(raw[name], name)
        if not isinstance(raw["start_weights"], str):
            raise ValueError(f"start_weights is {raw['start_weights']!r}; it should be a text")
        return cls(**{**raw, "ledger": Ledger(**raw["ledger"])})


def _check_cursor(raw: Mapping[str, Any], name: str) -> None:
    """Raise ValueError unless a place in the data holds counts, the place of a stream, and places in the sources of a mix."""
    for key, value in raw.items():
        if key == "place":
            check_table(value, f"{name}.place")
        elif key != "sources":
            check_count(value, f"{name}.{key}")
        elif not isinstance(value, list):
            raise ValueError(f"{name}.sources is {value!r}; it should be a list")
        else:
            for number, each in enumerate(value):
                check_table(each, f"{name}.sources.{number}")
                _check_cursor(each, f"{name}.sources.{number}")


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
        """The saved state. Raises CheckpointError if it cannot be read, has changed, or is that of another step."""
        return self._read()[0]

    def sampled_tokens(self) -> int:
        """Tokens sampled up to here. No other field is read, so a checkpoint of another version can be counted as well.

        Raises CheckpointError if the state cannot be read, has changed, or is that of another step.
        """
        try:
            raw, _ = read_sealed(self.state_file)
            if raw.get("step") != self.step:
                raise ValueError(f"{self.state_file.name} is that of step {raw.get('step')!r}")
            check_table(raw.get("ledger"), "ledger")
            tokens = raw["ledger"].get("sampled_tokens")
            check_count(tokens, "ledger.sampled_tokens")
        except (OSError, ValueError) as error:
            raise unreadable(self, error) from error
        return int(tokens)

    def verify(self, *, below: str = "") -> TrainState:
        """The saved state, after a check that the checkpoint's files are as they were written.

        Args:
            below: check only files whose path begins with this, such as "model/".

        Raises CheckpointError if a file is missing or has changed, or the state cannot be read.
        """
        state, files = self._read()
        try:
            changed = changed_files(self.path, files, below=below)
        except OSError as error:
            raise unreadable(self, error) from error
        if changed:
            more = f" (and {len(changed) - 1} more files)" if len(changed) > 1 else ""
            raise unreadable(self, ValueError(changed[0] + more))
        return state

    def _read(self) -> tuple[TrainState, Checksums]:
        try:
            raw, files = read_sealed(self.state_file)
            state = TrainState.from_raw(raw)
            if state.step != self.step:
                raise ValueError(f"{self.state_file.name} is that of step {state.step}")
        except (OSError, ValueError) as error:
            raise unreadable(self, error) from error
        return state, files


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


def unreadable(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    """The error about a damaged checkpoint, which offers an earlier one by name."""
    run = RunDir(checkpoint.path.parent.parent)
    earlier = [each.step for each in saved_checkpoints(run) if each.step < checkpoint.step]
    there = "continue from an earlier one" if earlier else "there is no earlier one: begin again"
    then = f"{there} with: {resume_command(run, earlier[-1] if earlier else 0)}"
    if isinstance(error, OSError):
        then = f"{remedy(error)}, or {then}"
    return CheckpointError(f"the checkpoint {shown(checkpoint.path)} cannot be read: {error}; {then}")


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
        aside = Checkpoint(state.step, folder / f"{WRITING}{final.path.name}")
        try:
            delete_tree(aside.path)
            folder.mkdir(exist_ok=True)  # without parents: a run directory that was removed is not made again
            aside.path.mkdir()
            aside.model.mkdir()
            policy.save(aside.model)
            learner.save(aside.path)
            aside.state_file.write_text(state.to_json(checksums(aside.path)), encoding="utf-8")
            for file in [*aside.path.rglob("*"), aside.path]:
                flush_to_disk(file)
            delete_tree(final.path)  # present only if the same step is saved again
            aside.path.rename(final.path)
            flush_to_disk(folder)
        except Exception as error:
            delete_leftovers(folder)
            # safetensors wraps the system's message about a full disk in its own error
            if not isinstance(error, OSError | SafetensorError):
                raise
            earlier = self.steps()
            then = f"Earlier checkpoints {earlier} are whole; {remedy(error)} and continue with --resume"
            if not earlier:
                then = f"There is no earlier one: {remedy(error)} and begin again with --resume"
            raise CheckpointError(
                f"the checkpoint of step {state.step} could not be written to {shown(folder)}: {error}. {then}"
            ) from error
        self._delete_old(state)
        return final.path

    def load(self, checkpoint: Checkpoint, policy: SavesWeights, learner: SavesMoments) -> TrainState:
        """Restore weights and moments of a checkpoint, once all its files are found as they were written.

        Raises CheckpointError if it is damaged, ModelError if it does not fit the recipe.
        """
        state = checkpoint.verify()
        try:
            policy.load_weights(checkpoint.model)
            learner.load(checkpoint.path, state.step, state.optimizer_steps)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise unreadable(checkpoint, error) from error
        return state

    def delete_after(self, step: int) -> None:
        """Delete all checkpoints after a step, the newest first, so that a kill leaves the ones before. Raises OSError."""
        for later in reversed(saved_checkpoints(self.run)):
            if later.step > step:
                delete_tree(later.path)

    def _delete_old(self, state: TrainState) -> None:
        kept = set(self.steps()[-self.keep_last :])
        if self.keep_best and state.best_step is not None:
            kept.add(state.best_step)
        for step in self.steps():
            if step not in kept:
                delete_tree(self.run.checkpoint(step))
