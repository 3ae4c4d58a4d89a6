"""The run directory: opened for logging, cut back to where the run begins, and its refusals explained."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from deepgrpo.config import Config
from deepgrpo.errors import CheckpointError, ConfigError
from deepgrpo.runs.checkpoints import Checkpoints
from deepgrpo.runs.files import FULL, delete_leftovers, delete_tree, remedy, system_code
from deepgrpo.runs.layout import RunDir, shown
from deepgrpo.runs.metrics import truncate_metrics
from deepgrpo.runs.moved import write_recipe
from deepgrpo.runs.resume import resume_command
from deepgrpo.train.log import RunLog
from deepgrpo.train.origin import Origin

_ON_WRITING = (*FULL, errno.EIO, errno.EROFS, errno.ESTALE)
"""Error numbers that concern an open file, so that the error does not name it."""


def open_log(run: RunDir, config: Config, origin: Origin, checkpoints: Checkpoints, *, show: bool = True) -> RunLog:
    """Open the log in the run directory, write the recipe there, and delete what came after the origin of the run.

    On resume, call it after the checkpoint has been restored: then a run that cannot be resumed is left unchanged.

    Args:
        show: also show the lines on standard output.

    Raises ConfigError or CheckpointError if the directory cannot be written.
    """
    at = shown(run.path)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        _make_folders(run, config)
        log = RunLog(
            run.path, config.log, total_steps=config.run.steps, name=config.run.name,
            recipe=config.model_dump(mode="json"), done_steps=max(0, origin.step), show=show,
        )  # fmt: skip
        write_recipe(run, config)
    except OSError as error:
        if origin.kind != "anew":
            refused = Path(os.fsdecode(error.filename2 or error.filename or run.config))
            raise CheckpointError(
                f"{shown(refused)} could not be written: {error}; the run is as it was: "
                f"{remedy(error)}, and continue with: {resume_command(run)}"
            ) from error
        raise unwritable(run, error) from error
    try:
        cut_back(run, origin, checkpoints)
    except OSError as error:
        raise CheckpointError(
            f"{at} could not be cut back to step {max(0, origin.step)}: {error}; {remedy(error)}, and repeat the command"
        ) from error
    return log


def cut_back(run: RunDir, origin: Origin, checkpoints: Checkpoints) -> None:
    """Delete what came after the origin of a run, and what a kill has left half written or half deleted.

    Checkpoints first, the newest before the others: a kill in between leaves metrics up to the newest that is left.

    Raises OSError or CheckpointError.
    """
    for folder in (run.path, run.checkpoints, run.tree_folder, run.eval_folder):
        delete_leftovers(folder)
    checkpoints.delete_after(origin.step)
    if origin.kind == "anew":
        delete_tree(run.start)
        for each in (run.report, run.final):
            each.unlink(missing_ok=True)
    truncate_metrics(run.metrics, origin.step)
    for step, path in [*run.tree_files().items(), *run.eval_files().items()]:
        if step > origin.step:
            path.unlink(missing_ok=True)


@contextmanager
def recipe_kept(run: RunDir, config: Config) -> Iterator[None]:
    """Write the recipe of a new run before anything is loaded, so that a run killed from now on can be resumed.

    A run that fails before its log is opened leaves no recipe. Raises ConfigError if the directory cannot be written.
    """
    fresh = not os.path.lexists(run.config)
    try:
        if fresh:
            write_recipe(run, config)
    except OSError as error:
        raise unwritable(run, error) from error
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit):
        if fresh and not run.log.exists():
            with suppress(OSError):
                run.config.unlink()
                run.place.unlink()
        raise


def unwritable(run: RunDir, error: OSError) -> ConfigError:
    at = shown(run.path)
    return ConfigError(f"run.dir: {at} cannot be written: {error}; {remedy(error)}, or choose another with --run.dir")


def _make_folders(run: RunDir, config: Config) -> None:
    """Make the folders that the run will write to, and raise OSError now if it cannot."""
    wanted = [run.path, run.checkpoints if run.checkpoints.exists() else run.path]
    for folder, due in ((run.tree_folder, config.log.trees_every is not None), (run.eval_folder, config.eval.scheduled)):
        if due:
            if os.path.lexists(folder) and not folder.is_dir():
                raise NotADirectoryError(20, "Not a directory", str(folder))
            folder.mkdir(exist_ok=True)
            wanted.append(folder)
    for folder in wanted:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied", str(folder))


@contextmanager
def refusals_explained(run: RunDir, checkpoints: Checkpoints) -> Iterator[None]:
    """Turn the system's refusals to read or write in the run directory into a CheckpointError with the remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _concerns(error, run.path):
            raise
        at = shown(run.path)
        if not run.path.is_dir():
            raise CheckpointError(
                f"{at} was removed or moved while the run was going ({error}); put it back, or begin anew"
            ) from error
        begins = "" if checkpoints.steps() else ", which begins again, as there is no checkpoint yet"
        raise CheckpointError(
            f"{at} cannot be written: {error}; {remedy(error)} and continue with: "
            f"{resume_command(run)}{begins}"
        ) from error


def _concerns(error: Exception, directory: Path) -> bool:
    """True if an error is about a file of the directory, or about an open file that can no longer be written."""
    named = [getattr(error, name, None) for name in ("filename", "filename2")]
    paths = [Path(os.fsdecode(each)) for each in named if isinstance(each, str | bytes | os.PathLike)]
    if paths:
        with suppress(OSError):
            return any(path.absolute().is_relative_to(directory.absolute()) for path in paths)
    return isinstance(error, SafetensorError) or system_code(error) in _ON_WRITING
