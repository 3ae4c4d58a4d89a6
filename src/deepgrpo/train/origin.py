"""Where a run begins: anew, at its start model, or at a checkpoint.

    deepgrpo train RECIPE             anew; a directory that holds a run is refused
    deepgrpo train --resume RUN       at the newest checkpoint; before the first one at the start model, if the warm start was
                                      finished, else anew, with the same result as an uninterrupted run
    ... --resume RUN --step N         at the checkpoint of step N; what came later is deleted. 0: as before the first one
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepgrpo.config import Config, load_recipe
from deepgrpo.errors import CheckpointError, ConfigError
from deepgrpo.runs.checkpoints import Checkpoint, saved_checkpoints
from deepgrpo.runs.files import has_leftovers
from deepgrpo.runs.layout import RunDir, shown
from deepgrpo.runs.metrics import newest_metrics
from deepgrpo.runs.resume import resume_command
from deepgrpo.runs.weights import damage_of_start


@dataclass(frozen=True, slots=True)
class Origin:
    """The place where a run begins. Example: Origin("checkpoint", Checkpoint(step=10, path=...))."""

    kind: Literal["anew", "start", "checkpoint"]
    checkpoint: Checkpoint | None = None
    remark: str | None = None
    """A line for the log, where the place is not the obvious one."""

    @property
    def step(self) -> int:
        """The last step that is kept; -1: none, not even the evaluation before the first step."""
        return -1 if self.checkpoint is None else self.checkpoint.step


def new_origin(run: RunDir, *, overwrite: bool) -> Origin:
    """The origin of a new run. Raises ConfigError if the directory already holds one that is not to be overwritten."""
    if not _is_used(run):
        return Origin("anew")
    at = shown(run.path)
    if not overwrite:
        raise ConfigError(
            f"run.name: the directory {at} already holds a run; continue it with: {resume_command(run)}, "
            "choose another with --run.name NAME, or delete it with --run.overwrite true"
        )
    return Origin("anew", remark=f"the run that {at} held is deleted (run.overwrite)")


def resumed_origin(run: RunDir, step: int | None, config: Config) -> Origin:
    """The origin of a resumed run.

    Args:
        step: the checkpoint to continue from; default: the newest.

    Raises CheckpointError if there is no such checkpoint, or the checkpoints of the run have gone.
    """
    saved, at, start = saved_checkpoints(run), shown(run.path), shown(run.start)
    if step is not None:
        found = next((each for each in saved if each.step == step), None)
        if found is None and step != 0:
            raise CheckpointError(
                f"--step {step}: {at} has no checkpoint of that step; it has "
                f"{', '.join(str(each.step) for each in saved) or 'none'}, and 0 begins again"
            )
        if found is not None:
            return Origin("checkpoint", found)
    elif saved:
        return Origin("checkpoint", saved[-1])
    else:
        _refuse_lost_checkpoints(run)
    if config.warmstart is None:
        return Origin("anew", remark="no checkpoint yet: the run begins anew")
    damage = damage_of_start(run)
    if damage is None:
        return Origin("start", remark=f"no checkpoint yet: the run begins with the weights of its warm start, {start}")
    why = "" if damage == "it is missing" else f" (the start model {start} cannot be used: {damage})"
    return Origin("anew", remark=f"no checkpoint yet: the run begins anew with its warm start{why}")


def _is_used(run: RunDir) -> bool:
    """True if a directory already holds a run. A run that failed before its first step does not count."""
    return bool(saved_checkpoints(run)) or (run.metrics.exists() and run.metrics.stat().st_size > 0)


def _refuse_lost_checkpoints(run: RunDir) -> None:
    """Raise CheckpointError if a run without checkpoints has come further than its first one."""
    config, at = load_recipe(run.config), shown(run.path)
    due = [config.run.steps]
    if config.checkpoint.every is not None:
        due.append(config.checkpoint.every)
        if config.checkpoint.keep_best and config.eval.every:
            due.append(config.eval.every)
    done, first = newest_metrics(run.metrics).get("step", 0), min(due)
    # a kill while the first one was being written leaves its metrics and the half of it
    if done > first or (done == first > 0 and not has_leftovers(run.checkpoints)):
        raise CheckpointError(
            f"{at} holds no checkpoint, although its metrics reach step {done} and the first was due at step {first}; "
            f"put the checkpoints back, or begin again, which deletes the metrics: {resume_command(run, 0)}"
        )
