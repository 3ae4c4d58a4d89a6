"""Weights on disk that have checksums: the model of a checkpoint, and the start model with its `checksums.json`."""

from __future__ import annotations

import json
from pathlib import Path

from deepgrpo.errors import CheckpointError
from deepgrpo.runs.checkpoints import Checkpoint, model_in
from deepgrpo.runs.checksums import changed_files, checksums, is_checksums
from deepgrpo.runs.files import remedy
from deepgrpo.runs.layout import RunDir, step_of

_CHECKSUMS = "checksums.json"


def write_checksums(directory: Path) -> None:
    """Write the checksums of all files of a directory into it. Raises OSError."""
    (directory / _CHECKSUMS).write_text(json.dumps(checksums(directory), indent=1), encoding="utf-8")


def damage_of_start(run: RunDir) -> str | None:
    """Damage of the start model of a run, as a phrase; None if it is as it was written."""
    if not run.start.is_dir():
        return "it is no directory" if run.start.exists() else "it is missing"
    return _damage(run.start)


def check_weights(directory: Path) -> None:
    """Raise CheckpointError if the weights in a directory have changed since a run wrote them.

    A directory without checksums passes: a model from elsewhere, or one that was taken out of its run.
    """
    step = step_of(directory.parent.name)
    if step is not None and directory == model_in(directory.parent):
        checkpoint = Checkpoint(step, directory.parent)
        if checkpoint.state_file.exists():
            checkpoint.verify(below=f"{directory.name}/")
    elif (directory / _CHECKSUMS).exists() and (damage := _damage(directory)):
        raise CheckpointError(f"the weights in {directory} cannot be read: {damage}; put the files back, or name others")


def _damage(directory: Path) -> str | None:
    try:
        recorded = json.loads((directory / _CHECKSUMS).read_text(encoding="utf-8"))
        if not is_checksums(recorded):
            return f"{_CHECKSUMS} holds no checksums"
        changed = changed_files(directory, recorded)
    except OSError as error:
        return f"{error}; {remedy(error)}"
    except (ValueError, RecursionError):
        return f"{_CHECKSUMS} cannot be read"
    return changed[0] if changed else None
