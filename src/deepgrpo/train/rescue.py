"""A run that fails: what was reached is saved, and the message says how to go on.

    fails while sampling, scoring, crediting   the state after the last step is saved
    fails in the evaluation after a step       that step is saved; the resumed run evaluates first
    fails in the middle of an update           saved unless an optimizer step of it was taken
    fails before the first step                nothing to save: the start weights are in RUN/start after a warm start

A user's reward, strategy, segmenter or loss may raise at any step, and an engine may fail; neither costs the steps before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from deepgrpo.errors import CheckpointError, DeepGRPOError, first_line
from deepgrpo.runs.checkpoints import TrainState
from deepgrpo.runs.metrics import newest_metrics
from deepgrpo.train.setup import Run


@contextmanager
def saved_on_failure(run: Run) -> Iterator[None]:
    """Save `run.reached` if the work fails, and add to the error how to go on. Ctrl-C is no failure.

    Errors of the disk are not handled here: there is nowhere to save to. Nor is the loss of a learner in a cluster, after which
    the run resumes by itself.
    """
    try:
        yield
    except (CheckpointError, OSError, SafetensorError):
        raise
    except DeepGRPOError as error:
        error.args = (f"{error}\n{_rescue(run)}", *error.args[1:])
        raise
    except Exception as error:
        if not run.parts.loses_learners:
            error.add_note(_rescue(run))
        raise


def lacks_evaluation(run: Run, state: TrainState) -> bool:
    """True if a resumed run has no line of metrics for its step: it was saved when the evaluation of that step had failed."""
    return run.config.eval.scheduled and newest_metrics(run.paths.metrics).get("step", -1) < state.step


def _finite(weight: torch.Tensor) -> bool:
    """True without infinities and NaNs; takes no memory, which may have run out."""
    return all(bool(bound.isfinite()) for bound in weight.detach().aminmax())


def _rescue(run: Run) -> str:
    """Save what was reached; return a sentence on what was saved and how to go on."""
    go_on, reached, saved = run.go_on, run.reached, run.checkpoints.steps()
    if reached is None:
        return f"no step was taken, and the warm start was not finished; begin again with: {go_on}"
    step = reached.state.step
    if step in saved:
        return f"the checkpoint of step {step} has all steps so far; continue with: {go_on}"
    last = f"the newest checkpoint is that of step {saved[-1]}" if saved else "there is no checkpoint yet"
    if step == 0:
        kept = f"; the weights of the warm start are kept in {run.directory}/start" if run.paths.start.is_dir() else ""
        return f"no step was taken{kept}; continue with: {go_on}"
    # learners in other processes may have taken a part of their steps unseen
    moved = run.learner.optimizer_steps != reached.state.optimizer_steps or (run.updating and run.parts.loses_learners)
    if moved:
        return f"the update of step {step + 1} was half done, so it was not saved: {last}; continue with: {go_on}"
    try:
        if not all(_finite(weight) for weight in run.policy.trainable().values()):
            return f"the weights after step {step} are not finite, so they were not saved: {last}; continue with: {go_on}"
        torch.set_rng_state(reached.random)  # the failed step may have drawn for its dropout
        run.checkpoints.save(run.policy, run.learner, reached.state)
    except Exception as error:  # a device in error, a full disk: the first error is the one to report
        return f"the state after step {step} could not be saved ({first_line(error)}): {last}; continue with: {go_on}"
    return f"the state after step {step} is saved; continue with: {go_on}"
