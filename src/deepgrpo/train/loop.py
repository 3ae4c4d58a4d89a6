"""Training, from the first prompt to the last checkpoint. Read this first.

    prompts ─► grow(strategy, engine, reward) ─► credit ─► update ─► metrics, checkpoint
                 ▲                                            │
                 └──── policy version, strategy state ────────┘     (the only two edges back)
"""

from __future__ import annotations

import errno
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError

from deepgrpo import rng
from deepgrpo.config import Config, SamplingConfig, SyntheticData
from deepgrpo.engines.base import Engine
from deepgrpo.errors import CheckpointError, ConfigError
from deepgrpo.eval.evaluate import evaluate
from deepgrpo.explore.base import Signals
from deepgrpo.explore.grow import Growth, Judge, grow
from deepgrpo.explore.waves import grow_in_waves
from deepgrpo.prompts.source import Cursor, build_source
from deepgrpo.prompts.synthetic import SyntheticTask
from deepgrpo.records import Ledger, Prompt, SampleRequest, StepReport
from deepgrpo.rewards.base import judge
from deepgrpo.train.backend import Place
from deepgrpo.train.checkpoint import TrainState
from deepgrpo.train.dynamic import Batch, dynamic_metrics, gather, round_seed
from deepgrpo.train.health import HealthState
from deepgrpo.train.metrics import Metrics, tree_metrics
from deepgrpo.train.setup import Run, open_run, save_start, take_start
from deepgrpo.train.trees import save_trees
from deepgrpo.train.warmstart import Example, warm_start


def train(config: Config, *, resume: Path | None = None, place: Place | None = None) -> Path:
    """Run a recipe to its end, or on from the newest checkpoint of a run directory.

    `place` is where it samples and learns; absent: in this process (`train_on_cluster` in cluster/run.py is for a recipe
    with a section [cluster]).

    Ctrl-C and SIGTERM finish the step, save, and return; a second Ctrl-C stops at once. In a warm start they end it after
    its step with KeyboardInterrupt: half of one is no model to go on from, so there is nothing to save.

    Returns:
        the run directory.

    Raises:
        DeepGRPOError: see errors.py. An earlier checkpoint is never harmed.
    """
    if config.cluster is not None and place is None:
        raise ConfigError(
            "the recipe has a section [cluster], and this run stays in one process; use `deepgrpo train`, or take the section "
            "away with --cluster none"
        )
    run = open_run(config, resume, place)
    try:
        resumed = run.restore() if resume else None
        with run.open_log(resumed) as log, _graceful_stop(log.note) as stop:
            log.note(run.describe())
            state = resumed or _start(run, stop)
            # a run that is stopped before its first step is saved too: its warm start need not be done again
            saved = resumed.step if resumed else None
            if saved is None and run.place.loses:
                state, saved = _save(run, state), state.step
            while not _done(run, state) and not stop.requested:
                state, report = train_step(run, state)
                log.step(report)
                if _due(run, state):
                    state, saved = _save(run, state), state.step
            if state.step != saved:
                state = _save(run, state)
            _farewell(run, state)
    except (OSError, SafetensorError) as error:
        if not _disk_is_full(error):
            raise
        go_on = f"continue with: deepgrpo train --resume {run.directory}"
        if not run.checkpoints.steps():
            go_on = f"start the run anew: delete {run.directory}, which holds no checkpoint yet"
        raise CheckpointError(f"{run.directory} cannot be written: {error}; free some space and {go_on}") from error
    finally:
        run.close()
    return run.directory


def train_step(run: Run, state: TrainState) -> tuple[TrainState, StepReport]:
    """One turn of the algorithm: everything between two policies."""
    config, step = run.config, state.step + 1
    began = time.perf_counter()
    batch = run.ahead.take(step)
    if batch is None:
        run.place.begin_step()
        batch = _sample(run, state)
    growth, credits = batch.growth, batch.credits
    # dropped trees are evidence too: without them the fit would miss the pivots that no branch recovered from
    strategy_state = run.strategy.observe(state.strategy, growth.trees)
    following = replace(state, step=step, cursor=batch.cursor.to_dict(), strategy=strategy_state)
    if run.place.overlaps:
        _sample_ahead(run, following, growth.stats.sampled_tokens)
    learning = time.perf_counter()
    update = run.learner.update(*batch.trained)
    seconds_learn = time.perf_counter() - learning
    run.ahead.wait()

    spent = update.ledger + Ledger(
        sampled_tokens=growth.stats.sampled_tokens,
        sampled_sequences=sum(len(tree.nodes) for tree in growth.trees),
        prefix_tokens=growth.stats.prefix_tokens,
        prefix_tokens_encoded=growth.stats.prefix_tokens_encoded,
        signal_tokens=growth.signal_tokens,
        verifier_calls=growth.verifier_calls,
        seconds_sample=growth.stats.seconds,
        seconds_signals=growth.seconds_signals,
        seconds_reward=growth.seconds_reward,
        seconds_learn=seconds_learn,
    )
    before = state.optimizer_steps
    state = replace(following, optimizer_steps=run.learner.optimizer_steps, ledger=state.ledger + spent)
    metrics: Metrics = {
        **tree_metrics(growth.trees, credits),
        **(run.overlong.metrics(growth.trees) if run.overlong else {}),
        **(_dynamic(run, batch) if config.sampling.dynamic else {}),
        **update.metrics,
        **run.strategy.report(strategy_state),
        "tokens_per_s": growth.stats.sampled_tokens / max(growth.stats.seconds, 1e-9),
        "sampled_tokens": float(growth.stats.sampled_tokens),
        "prefix/reused": growth.stats.reused,
        **({"branch/prefix_reused": growth.branches.reused} if growth.branches.prefix_tokens else {}),
        "time/sample": growth.stats.seconds,
        "time/reward": growth.seconds_reward,
        **({"time/signals": growth.seconds_signals} if growth.signal_tokens else {}),
        **({"overlap/staleness": _staleness(growth, before)} if run.place.overlaps else {}),
        **run.place.metrics(),
        "time/learn": seconds_learn,
    }
    if config.log.trees_every and step % config.log.trees_every == 0:
        save_trees(run.directory / "trees" / f"step-{step:06d}.jsonl.gz", growth.trees, credits)
    if config.eval.every and (step % config.eval.every == 0 or _done(run, state)):
        state, found = _evaluate(run, state)
        metrics |= found
    metrics["time/step"] = time.perf_counter() - began
    health, warnings = run.monitor.check(HealthState.from_dict(state.health), metrics)
    return replace(state, health=health.as_dict()), StepReport(step, metrics, state.ledger, warnings)


def _sample(run: Run, state: TrainState) -> Batch:
    """The trees of the step after `state`, and their credit."""
    config, sampling = run.config, run.config.sampling

    def grown(prompts: Sequence[Prompt], number: int) -> Growth:
        def wave(
            prompts: Sequence[Prompt], first: int, *, engine: Engine, judge: Judge, signals: Signals | None
        ) -> Growth:
            return grow(
                prompts, run.strategy, state.strategy, engine, judge,
                decode=run.decode, params=run.sampling_params, limits=run.limits,
                seed=round_seed(config.run.seed, number), step=state.step + 1, version=state.optimizer_steps,
                signals=signals, first=first,
            )  # fmt: skip

        if run.place.waves == 1:
            return wave(prompts, 0, engine=run.engine, judge=run.judge, signals=run.signals)
        return grow_in_waves(
            prompts, run.place.waves, wave, engine=run.engine, judge=run.judge, signals=run.signals
        )

    return gather(
        run.source, Cursor.from_dict(state.cursor), config.run.prompts_per_step, grown, run.strategy.credit,
        dynamic=sampling.dynamic, max_rounds=sampling.max_rounds,
    )  # fmt: skip


def _sample_ahead(run: Run, state: TrainState, sampled_tokens: int) -> None:
    """Begin with the batch after `state`, whose update is still to come, by the weights there are.

    Not behind the last step. And not across a checkpoint: the step after it samples with the newest weights whether the run
    was resumed there or not.
    """
    paid = replace(state, ledger=state.ledger + Ledger(sampled_tokens=sampled_tokens))
    every = run.config.checkpoint.every
    if not _done(run, paid) and not (every and state.step % every == 0):
        run.place.begin_step()
        run.ahead.start(state.step + 1, lambda: _sample(run, state))


def _dynamic(run: Run, batch: Batch) -> Metrics:
    return dynamic_metrics(batch, run.config.run.prompts_per_step, run.config.explore.success_threshold)


def _staleness(growth: Growth, optimizer_steps: int) -> float:
    """How many optimizer steps the learner is ahead of the weights that sampled a node, in the mean over nodes."""
    versions = [node.version for tree in growth.trees for node in tree.nodes]
    return optimizer_steps - sum(versions) / max(1, len(versions))


def _start(run: Run, stop: _Stop) -> TrainState:
    """The state before the first step: warm start if the recipe asks for one, reference, first evaluation."""
    if run.config.warmstart:
        _warm_start(run, stop)
    run.freeze_reference()
    state = TrainState(
        cursor=Cursor().to_dict(), strategy=run.strategy.initial_state(), health=HealthState().as_dict()
    )
    if run.config.eval.every:
        state, metrics = _evaluate(run, state)
        run.log.step(StepReport(0, metrics, state.ledger))
    return state


def _warm_start(run: Run, stop: _Stop) -> None:
    """Imitate the task's written solutions, on questions of the training split; or take over what another run has made.

    Raises KeyboardInterrupt if it was stopped before its end.
    """
    if run.config.warmstart and run.config.warmstart.from_ is not None:
        take_start(run, Path(run.config.warmstart.from_))
        return
    config, data = run.config, run.config.data
    assert config.warmstart is not None and isinstance(data, SyntheticData)
    task, tokenizer = SyntheticTask(data), run.policy.tokenizer
    # a stream of its own, so that the questions of the warm start are not those of the first steps
    source = build_source(
        data.model_copy(update={"seed": data.seed + 1_000_003}), tokenizer, seed=config.run.seed, context=run.policy.context
    )

    def examples(start: int, count: int) -> list[Example]:
        prompts, _ = source.take(Cursor(position=start) if source.size is None else _wrapped(start, source.size), count)
        return [
            (p.tokens, (*tokenizer(task.solution(p), add_special_tokens=False).input_ids, tokenizer.eos_token_id))
            for p in prompts
        ]

    def progress(step: int, loss: float, accuracy: float | None) -> None:
        assert config.warmstart is not None
        if accuracy is not None or step % config.warmstart.check_every == 0:
            measured = "" if accuracy is None else f"  sampled accuracy {accuracy:.1%}"
            run.log.note(f"warm start {step}/{config.warmstart.steps}  loss {loss:.3f}{measured}")

    def check() -> float:
        run.learner.adopt()
        return _sampled_accuracy(run)

    imitated = warm_start(
        run.policy, config.warmstart, examples, tokens_per_pack=config.learner.tokens_per_pack,
        check=check, progress=progress, stop=lambda: stop.requested,
    )  # fmt: skip
    if imitated.stopped:
        run.log.note(
            f"stopped after step {imitated.steps} of the warm start, which was not finished: nothing was saved; start the "
            "run anew with the same command"
        )
        raise KeyboardInterrupt
    save_start(run)


def _sampled_accuracy(run: Run) -> float:
    """Mean reward of one sampled response per held-out question: `eval/sampled` with one sample, and no greedy pass."""
    prompts, limits, seed = run.eval_prompts, run.limits, run.config.run.seed
    requests = [
        SampleRequest(
            p.tokens, (rng.key(seed, "eval", p.id, 0),), min(limits.max_new_tokens, limits.max_total_tokens - len(p.tokens))
        )
        for p in prompts
    ]  # fmt: skip
    completions, _ = run.engine.sample(requests, run.sampling_params)
    done = [only for (only,) in completions]
    scores = judge(
        run.eval_reward, 0.0, prompts, [run.decode(each.tokens) for each in done], [each.tokens for each in done],
        [each.finish for each in done],
    )  # fmt: skip
    return sum(score.value for score in scores) / len(scores)


def _wrapped(start: int, size: int) -> Cursor:
    return Cursor(epoch=start // size, position=start % size)


def _evaluate(run: Run, state: TrainState) -> tuple[TrainState, Metrics]:
    """Measure the policy on the held-out questions; write the answers; remember the first, last and best accuracy."""
    began = time.perf_counter()
    run.place.begin_step()
    config = run.config
    result = evaluate(
        run.engine, run.eval_reward, run.eval_prompts, run.policy.tokenizer, sampling=_sampling(run),
        samples=config.eval.samples, k=config.eval.k, seed=config.run.seed,
        truncated_value=(config.eval.reward or config.reward).truncated_value,
        success_threshold=config.explore.success_threshold,
    )  # fmt: skip
    path = run.directory / "eval" / f"step-{state.step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in result.rows)
    seconds = time.perf_counter() - began
    greedy = result.metrics["eval/greedy"]
    # step 0 has no checkpoint that could be kept
    if state.step and (state.best_value is None or greedy > state.best_value):
        state = replace(state, best_step=state.step, best_value=greedy)
    state = replace(
        state, ledger=state.ledger + Ledger(seconds_eval=seconds), last_value=greedy,
        first_value=greedy if state.first_value is None else state.first_value,
    )  # fmt: skip
    return state, {**result.metrics, "time/eval": seconds}


def _sampling(run: Run) -> SamplingConfig:
    """The recipe's sampling with the model's context filled in."""
    return run.config.sampling.model_copy(update={"max_total_tokens": run.limits.max_total_tokens})


def _done(run: Run, state: TrainState) -> bool:
    budget = run.config.run.max_sampled_tokens
    return state.step >= run.config.run.steps or (budget is not None and state.ledger.sampled_tokens >= budget)


def _save(run: Run, state: TrainState) -> TrainState:
    """Write a checkpoint; the time it took is in the ledger from the next step on."""
    began = time.perf_counter()
    run.checkpoints.save(run.policy, run.learner, state)
    return replace(state, ledger=state.ledger + Ledger(seconds_save=time.perf_counter() - began))


def _due(run: Run, state: TrainState) -> bool:
    """Whether a checkpoint is written after this step: every so many steps, and of a new best evaluation."""
    every, keep_best = run.config.checkpoint.every, run.config.checkpoint.keep_best
    return every is not None and (state.step % every == 0 or (keep_best and state.best_step == state.step))


def _farewell(run: Run, state: TrainState) -> None:
    """What came of it, and where it is."""
    if not _done(run, state):
        run.log.note(
            f"stopped after step {state.step} and saved; continue with: deepgrpo train --resume {run.directory}"
        )
    if state.first_value is not None and state.last_value is not None:
        gain = 100 * (state.last_value - state.first_value)
        run.log.note(
            f"greedy accuracy on {len(run.eval_prompts)} held-out questions: {state.first_value:.1%} before, "
            f"{state.last_value:.1%} after {state.step} steps ({gain:+.1f} points, "
            f"{state.ledger.sampled_tokens:,} sampled tokens)"
        )
    run.log.note(f"run directory: {run.directory}")


def _disk_is_full(error: Exception) -> bool:
    # safetensors wraps what the system says in its own error
    return not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class _Stop:
    requested: bool = False


@contextmanager
def _graceful_stop(say: Callable[[str], None]) -> Iterator[_Stop]:
    """Inside, the first Ctrl-C or SIGTERM asks for an end after the step; the second Ctrl-C is the usual one."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals can be caught in the main thread only
        return

    def request(number: int, frame: FrameType | None) -> None:
        again, stop.requested = stop.requested, True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Python refuses to write into a file in the middle of another write; the step matters more than the word
        with suppress(RuntimeError, OSError):
            if not again:
                say("finishing this step; Ctrl-C again stops at once")

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
