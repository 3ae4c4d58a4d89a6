"""The run directory: refused if it is in use, opened for logging, and the start weights in it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from deepgrpo.config import Config, to_toml
from deepgrpo.errors import CheckpointError, ConfigError
from deepgrpo.model.policy import Policy
from deepgrpo.runs.checkpoints import Checkpoints
from deepgrpo.runs.files import replace_file
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.metrics import truncate_metrics
from deepgrpo.train.log import RunLog


def refuse_used(directory: Path, checkpoints: Checkpoints) -> None:
    """Raise ConfigError if a directory already holds a run. A run that failed before its first step does not count."""
    metrics = RunDir(directory).metrics
    if checkpoints.steps() or (metrics.exists() and metrics.stat().st_size):
        raise ConfigError(
            f"run.name: the directory {directory} already holds a run; choose another with --run.name NAME"
            + (
                f", or continue it with: deepgrpo train --resume {directory}"
                if checkpoints.steps()
                else "; or delete it, as it has no checkpoint to go on from"
            )
        )


def require_checkpoint(directory: Path, checkpoints: Checkpoints) -> None:
    """Raise CheckpointError if there is nothing to resume from."""
    if not checkpoints.steps():
        raise CheckpointError(
            f"{directory} holds no checkpoint to resume from; start the run anew: delete the directory, or choose "
            "another --run.name"
        )


def open_log(directory: Path, config: Config, resumed_step: int | None) -> RunLog:
    """Open the log in the run directory and write the recipe there: the first writes of a run.

    On resume, call it after the checkpoint has been restored: then a run that cannot be resumed is left unchanged. Metrics
    after the checkpoint are dropped. A new run drops what a failed attempt left before its first step.

    Raises ConfigError or CheckpointError if the directory cannot be written.
    """
    paths = RunDir(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if resumed_step is None:
            shutil.rmtree(paths.start, ignore_errors=True)
        log = RunLog(
            directory, config.log, total_steps=config.run.steps, name=config.run.name,
            recipe=config.model_dump(mode="json"), done_steps=resumed_step or 0,
        )  # fmt: skip
        replace_file(paths.config, to_toml(config))
    except OSError as error:
        if resumed_step is not None:
            raise CheckpointError(
                f"{paths.config} could not be written: {error}; the run is as it was: free some space or "
                f"fix the permissions, and continue with: deepgrpo train --resume {directory}"
            ) from error
        raise ConfigError(f"run.dir: {directory} cannot be written: {error}; choose another with --run.dir") from error
    truncate_metrics(paths.metrics, resumed_step or 0)
    return log


def save_start(policy: Policy, directory: Path) -> None:
    """Save the weights after a warm start: a resumed run takes its KL reference from them."""
    start = RunDir(directory).start
    aside = start.with_name(f".tmp-{start.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    policy.save(aside)
    shutil.rmtree(start, ignore_errors=True)  # a rename does not replace a directory
    aside.rename(start)


def load_start(policy: Policy, directory: Path) -> None:
    """Load the weights that `save_start` saved, if there are any. Raises CheckpointError if they cannot be read."""
    start = RunDir(directory).start
    if start.is_dir():
        try:
            policy.load_weights(start)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the start model {start} cannot be read: {error}; without it the KL term has no reference: start the run "
                "anew, or set loss.beta to 0 and delete that directory"
            ) from error


@contextmanager
def full_disk_explained(directory: Path, checkpoints: Checkpoints) -> Iterator[None]:
    """Turn the errors of a full disk into a CheckpointError with the command that continues the run."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors wraps the operating system's error in its own type
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        go_on = f"continue with: deepgrpo train --resume {directory}"
        if not checkpoints.steps():
            go_on = f"start the run anew: delete {directory}, which holds no checkpoint yet"
        raise CheckpointError(f"{directory} cannot be written: {error}; free some space and {go_on}") from error
