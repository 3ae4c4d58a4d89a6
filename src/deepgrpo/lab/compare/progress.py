"""Progress of the runs of an experiment, read from their checkpoints and their results. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from deepgrpo.lab.compare.final_eval import read_final
from deepgrpo.lab.compare.plan import Plan, PlannedRun
from deepgrpo.runs.checkpoints import newest_checkpoint
from deepgrpo.runs.metrics import newest_metrics


@dataclass(frozen=True, slots=True)
class Progress:
    """A run's newest checkpoint. Example: Progress(step=40, tokens=812_000, done=False, over=False)."""

    step: int
    tokens: int
    done: bool
    """True if it has sampled its budget."""
    over: bool
    """True if it took its last step short of the budget."""


def progress(run: PlannedRun) -> Progress:
    """Progress of a run; all zero without a checkpoint, unless its results are complete."""
    newest = newest_checkpoint(run.paths)
    if newest is None:
        return _by_results(run)
    step, tokens = newest.step, newest.sampled_tokens()
    budget = run.config.run.max_sampled_tokens
    done = budget is not None and tokens >= budget
    return Progress(step, tokens, done, not done and step >= run.config.run.steps)


def _by_results(run: PlannedRun) -> Progress:
    """Progress of a run whose checkpoints were deleted, or left on another machine, after it had finished."""
    line = newest_metrics(run.paths.metrics)
    tokens = int(line.get("ledger/sampled_tokens") or 0)
    if run.arm is None or tokens < run.budget or not (run.trial or run.paths.final.is_file()):
        return Progress(0, 0, False, False)
    return Progress(int(line["step"]), tokens, True, False)


def is_kept(run: PlannedRun) -> bool:
    """True if the run's directory holds work to continue from."""
    return run.paths.start.is_dir() if run.arm is None else progress(run).step > 0


def has_budget(run: PlannedRun) -> bool:
    """True if a run has sampled its budget."""
    return progress(run).done


def is_finished(plan: Plan, run: PlannedRun) -> bool:
    """True if a run has sampled its budget and has a final evaluation of its last weights."""
    at = progress(run)
    return at.done and read_final(run.directory, plan.final, at.step) is not None
