"""The training loop, from the first prompt to the last checkpoint. Read this first.

    prompts ─► grow(strategy, engine, reward) ─► credit ─► update ─► metrics, checkpoint
                 ▲                                            │
                 └──── policy version, strategy state ────────┘     (the only two edges back)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from deepgrpo.config import Config
from deepgrpo.engines.base import named
from deepgrpo.errors import ConfigError
from deepgrpo.explore.grow import Growth, grow
from deepgrpo.foreign import unchanged_process
from deepgrpo.ledger import Ledger, StepReport
from deepgrpo.progress import phase, showing
from deepgrpo.prompts.source import Cursor
from deepgrpo.records import Prompt
from deepgrpo.rewards.base import metrics_of
from deepgrpo.runs.checkpoints import TrainState
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.lock import hold
from deepgrpo.runs.trees import save_trees
from deepgrpo.train.backend import Backend
from deepgrpo.train.closing import closing_line
from deepgrpo.train.directory import recipe_kept, refusals_explained
from deepgrpo.train.dynamic import Batch, dynamic_metrics, gather, round_seed
from deepgrpo.train.evaluation import evaluate_run
from deepgrpo.train.health_state import HealthState
from deepgrpo.train.log import opening
from deepgrpo.train.metrics import Metrics, sampling_cost, staleness, step_metrics
from deepgrpo.train.rescue import lacks_evaluation, saved_on_failure
from deepgrpo.train.setup import Run, open_run
from deepgrpo.train.shortage import shortage_explained
from deepgrpo.train.stop import Stop, graceful_stop
from deepgrpo.train.warmstart import warm_start
from deepgrpo.train.watch import Watcher


def train(
    config: Config, *, resume: Path | None = None, step: int | None = None, backend: Backend | None = None
) -> Path:
    """Train a recipe to its end, or continue a run directory (train/origin.py says where).

    Ctrl-C and SIGTERM finish the step, save, and return; a second Ctrl-C stops at once. A warm start ends after its current
    step with KeyboardInterrupt and saves nothing, because a run cannot start from an unfinished one.

    Args:
        resume: the run directory to continue.
        step: the checkpoint to continue from, whose later ones are deleted; default: the newest.
        backend: where to sample and learn; default: this process. `train_on_cluster` (cluster/run.py) runs recipes with a
            section [cluster].

    Returns:
        the run directory.

    Raises:
        DeepGRPOError: see errors.py. What was reached is saved (train/rescue.py). Earlier checkpoints are never harmed.
    """
    for _ in steps(config, resume=resume, step=step, backend=backend):
        pass
    return (resume or RunDir.of(config.run).path).absolute()


def steps(
    config: Config, *, resume: Path | None = None, step: int | None = None, backend: Backend | None = None,
    watcher: Watcher | None = None, show: bool = True,
) -> Iterator[StepReport]:  # fmt: skip
    """`train`, as an iterator over the reports of its steps. Closing it ends the run as Ctrl-C does: saved, to be resumed.

    Args:
        watcher: is told of every step, evaluation and checkpoint.
        show: show the log on standard output; RUN/log.txt has it in any case.
    """
    if config.cluster is not None and backend is None:
        raise ConfigError(
            "the recipe has a section [cluster], and this run stays in one process; use `deepgrpo train`, or take the section "
            "away with --cluster none"
        )
    directory = RunDir((resume or RunDir.of(config.run).path).absolute())
    kept = nullcontext() if resume else recipe_kept(directory, config)
    with hold(directory) as remark, kept:
        with opening(show=show):
            run = open_run(config, resume, backend, step=step)
        run.watcher = watcher or run.watcher
        try:
            yield from _steps(run, [each for each in (remark, run.origin.remark) if each], show)
        finally:
            run.close()


def _steps(run: Run, remarks: Sequence[str], show: bool) -> Iterator[StepReport]:
    """Take the steps of a run from its origin on.

    Args:
        remarks: first lines of the log.
    """
    with refusals_explained(run.paths, run.checkpoints):
        resumed = run.restore() if run.origin.checkpoint else None
        with run.open_log(show=show) as log, graceful_stop(log.note) as stop:
            for line in (*remarks, run.describe()):
                log.note(line)
            with saved_on_failure(run):
                state = resumed or _start(run, stop)
                saved = resumed.step if resumed else None
                if resumed and lacks_evaluation(run, state):
                    state, saved = _evaluate(run, state), None
                if saved is None and run.parts.loses_learners:
                    state, saved = _save(run, state), state.step
                while not _done(run, state) and not stop.requested:
                    state, report = train_step(run, state)
                    log.step(report, run.grown)
                    run.reach(state)
                    run.watcher.stepped(report, run.grown)
                    if _due(run, state):
                        state, saved = _save(run, state), state.step
                    try:
                        with showing(None):  # what the caller does meanwhile is none of ours
                            yield report
                    except GeneratorExit:  # the caller has seen enough
                        stop.requested = True
            # also before the first step, so that the warm start is not repeated
            if state.step != saved:
                state = _save(run, state)
            _summarize(run, state)


def _start(run: Run, stop: Stop) -> TrainState:
    """Warm-start if the recipe asks for it, freeze the KL reference, evaluate; return the state before the first step."""
    if run.config.warmstart and run.origin.kind != "start":
        warm_start(run, stop)
        state = run.begin()
    else:
        state = run.restore()
    return _evaluate(run, state) if run.config.eval.scheduled else state


def _evaluate(run: Run, state: TrainState) -> TrainState:
    """Evaluate outside of a step, and log the figures as a line of their own."""
    run.reach(state)
    state, metrics = evaluate_run(run, state)
    report = StepReport(state.step, metrics, state.ledger)
    run.log.step(report)
    run.watcher.evaluated(report)
    return state


def train_step(run: Run, state: TrainState) -> tuple[TrainState, StepReport]:
    """One turn of the algorithm: everything between two policies."""
    config, step = run.config, state.step + 1
    began = time.perf_counter()
    run.reach(state)
    batch = run.prefetch.take(step)
    if batch is None:
        run.parts.begin_step()
        batch = sample_batch(run, state)
    trees = run.grown = batch.growth.trees

    drawn = run.draw(state)
    memory = state.curriculum
    if drawn is not None:
        indices = drawn.indices(drawn.start, len(trees))
        memory = drawn.curriculum.observe(memory, step, indices, trees, config.explore.success_threshold)

    # before the update: a strategy of a user's own that fails here costs no step
    with unchanged_process():
        # trees without an advantage are evidence too: the fit must see the pivots from which no branch recovered
        strategy_state = run.strategy.observe(state.strategy, trees)
        fit = run.strategy.report(strategy_state)
    following = replace(state, step=step, cursor=batch.cursor.to_dict(), strategy=strategy_state, curriculum=memory)
    if run.parts.overlaps:
        _prefetch(run, following, batch.growth.sampled_tokens)

    learning = time.perf_counter()
    run.updating = True
    with shortage_explained(config, step, "learning"):
        update = run.learner.update(*batch.trained)
    run.updating = False
    seconds_learn = time.perf_counter() - learning
    run.prefetch.wait()

    spent = update.ledger + sampling_cost(batch.growth) + Ledger(seconds_learn=seconds_learn)
    metrics: Metrics = {
        **step_metrics(batch.growth, batch.credits, seconds_learn, config.explore.success_threshold),
        **update.metrics,
        **fit,
        **run.source.metrics(batch.cursor),
        **run.parts.metrics(),
        **metrics_of({id(each): each for each in (run.parts.reward, run.eval_reward)}.values()),
    }
    if drawn is not None:
        metrics |= drawn.curriculum.metrics(drawn.memory, step, indices)
    if run.overlong:
        metrics |= run.overlong.metrics(trees)
    if config.sampling.dynamic:
        metrics |= dynamic_metrics(batch, config.run.prompts_per_step, config.explore.success_threshold)
    if run.parts.overlaps:
        metrics["overlap/staleness"] = staleness(trees, state.optimizer_steps)
    if config.log.trees_every and step % config.log.trees_every == 0:
        save_trees(run.paths.trees(step), trees, batch.credits)

    sampled_before = state.ledger.sampled_tokens
    state = replace(following, optimizer_steps=run.learner.optimizer_steps, ledger=state.ledger + spent)
    run.reach(state)
    due = config.eval.due(step, sampled_before, state.ledger.sampled_tokens)
    if due or (config.eval.scheduled and _done(run, state)):
        state, found = evaluate_run(run, state)
        metrics |= found
    metrics["time/step"] = time.perf_counter() - began
    health, warnings = run.monitor.check(HealthState.from_dict(state.health), metrics)
    return replace(state, health=health.as_dict()), StepReport(step, metrics, state.ledger, warnings)


def sample_batch(run: Run, state: TrainState) -> Batch:
    """Sample the trees of the step after `state`, and compute their credit."""
    config = run.config

    def grow_round(prompts: Sequence[Prompt], number: int) -> Growth:
        return grow(
            prompts, run.strategy, state.strategy, run.engine, run.judge, decode=run.decode, params=run.sampling_params,
            limits=run.limits, seed=round_seed(config.run.seed, number), step=state.step + 1,
            version=state.optimizer_steps, signals=run.signals, episodes=run.episodes,
        )  # fmt: skip

    with named(f"step {state.step + 1}"), unchanged_process(), shortage_explained(config, state.step + 1, "sampling"):
        return gather(
            run.draw(state) or run.source, Cursor.from_dict(state.cursor), config.run.prompts_per_step, grow_round,
            run.strategy.credit,
            dynamic=config.sampling.dynamic, max_rounds=config.sampling.max_rounds,
        )  # fmt: skip


def _prefetch(run: Run, state: TrainState, sampled_tokens: int) -> None:
    """Start sampling the batch after `state` with the present weights, before the update of `state`.

    Not after the last step, and not across a checkpoint: the step after it samples with the newest weights, whether or not
    the run was resumed there.

    Args:
        sampled_tokens: of the batch of `state`, which its ledger does not include yet.
    """
    paid = replace(state, ledger=state.ledger + Ledger(sampled_tokens=sampled_tokens))
    every = run.config.checkpoint.every
    if not _done(run, paid) and not (every and state.step % every == 0):
        run.parts.begin_step()
        run.prefetch.start(state.step + 1, lambda: sample_batch(run, state))


def _done(run: Run, state: TrainState) -> bool:
    """True if the run has taken all its steps or passes over the data, or sampled as many tokens as it may."""
    wanted = run.config.run
    if wanted.max_sampled_tokens is not None and state.ledger.sampled_tokens >= wanted.max_sampled_tokens:
        return True
    if wanted.epochs is not None and Cursor.from_dict(state.cursor).epoch >= wanted.epochs:
        return True
    return state.step >= wanted.steps


def _due(run: Run, state: TrainState) -> bool:
    """True if a checkpoint follows this step: every `checkpoint.every` steps, and at a new best evaluation."""
    every, keep_best = run.config.checkpoint.every, run.config.checkpoint.keep_best
    return every is not None and (state.step % every == 0 or (keep_best and state.best_step == state.step))


def _save(run: Run, state: TrainState) -> TrainState:
    """Write a checkpoint; its time enters the ledger of the next step."""
    began = time.perf_counter()
    with phase("saving"):
        path = run.checkpoints.save(run.policy, run.learner, state)
    run.watcher.saved(state.step, path)
    return replace(state, ledger=state.ledger + Ledger(seconds_save=time.perf_counter() - began))


def _summarize(run: Run, state: TrainState) -> None:
    """Log how the run ended, the gain in accuracy, and the run directory."""
    if not _done(run, state):
        run.log.note(f"stopped after step {state.step} and saved; continue with: {run.go_on}")
    if line := closing_line(state, len(run.eval_prompts)):
        run.log.note(line)
    run.log.note(f"run directory: {run.directory}")
