"""Everything that a run builds once, and how it is put together."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from deepgrpo.config import Config, PretrainedModel, ScratchModel, TaskReward, to_toml
from deepgrpo.engines.base import Engine, SamplingParams
from deepgrpo.errors import CheckpointError, ConfigError, ModelError
from deepgrpo.explore import build_strategy
from deepgrpo.explore.base import Limits, Signals, Strategy
from deepgrpo.explore.grow import Judge
from deepgrpo.model.device import resolve_device
from deepgrpo.model.loading import load_policy, load_tokenizer, scratch_policy
from deepgrpo.model.meta_policy import build_meta_policy
from deepgrpo.model.policy import Policy
from deepgrpo.model.tree_gate import PackingVerdict
from deepgrpo.prompts import synthetic
from deepgrpo.prompts.source import PromptSource, build_source
from deepgrpo.prompts.tasks import build_task
from deepgrpo.records import Prompt
from deepgrpo.rewards.base import Reward, build_reward, judge
from deepgrpo.rewards.overlong import OverlongPenalty
from deepgrpo.train.backend import OneProcess, Place, UpdatesPolicy
from deepgrpo.train.checkpoint import Checkpoints, TrainState
from deepgrpo.train.engine import response_limits
from deepgrpo.train.health import HealthMonitor
from deepgrpo.train.log import RunLog, replace_file, truncate
from deepgrpo.train.prefetch import Ahead
from deepgrpo.train.signals import build_signals

START = "start"
"""Inside a run directory: the weights behind a warm start, from which the KL reference is made on resume."""


@dataclass
class Run:
    """The parts of a run. What changes from step to step is in `TrainState`, the weights and the moments aside."""

    config: Config
    directory: Path
    policy: Policy
    source: PromptSource
    strategy: Strategy
    engine: Engine
    reward: Reward
    eval_reward: Reward
    eval_prompts: Sequence[Prompt]
    learner: UpdatesPolicy
    checkpoints: Checkpoints
    monitor: HealthMonitor
    limits: Limits
    signals: Signals | None = None
    """Measures what the strategy wants to know of sampled tokens; None if that is nothing."""
    place: Place = field(default_factory=OneProcess)
    """Where engine and learner are."""
    ahead: Ahead = field(default_factory=Ahead)
    """The next batch, where a place samples it while the learner works."""
    log: RunLog = field(init=False)
    """From `open_log` on."""

    @property
    def judge(self) -> Judge:
        return functools.partial(judge, self.reward, self.config.reward.truncated_value, penalty=self.overlong)

    @property
    def overlong(self) -> OverlongPenalty | None:
        """The penalty on length, if the recipe has one; an evaluation has none."""
        wanted, limits = self.config.reward.overlong, self.limits
        return None if wanted is None else OverlongPenalty(wanted, limits.max_new_tokens, limits.max_total_tokens)

    @property
    def decode(self) -> Callable[[Sequence[int]], str]:
        return lambda tokens: self.policy.tokenizer.decode(tokens, skip_special_tokens=True)

    @property
    def sampling_params(self) -> SamplingParams:
        wanted = self.config.sampling
        return SamplingParams(wanted.temperature, wanted.top_p, stop=wanted.stop)

    def freeze_reference(self) -> None:
        """Take the present weights as the start model of the KL term, if there is one."""
        self.learner.freeze_reference()

    def restore(self) -> TrainState:
        """Weights, moments and state of the newest checkpoint; the reference is the start model, as ever."""
        if (self.directory / START).is_dir():
            try:
                self.policy.load_weights(self.directory / START)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"the start model {self.directory / START} cannot be read: {error}; without it the KL term has no "
                    "reference: start the run anew, or set loss.beta to 0 and delete that directory"
                ) from error
        self.freeze_reference()
        return self.checkpoints.load(self.policy, self.learner)

    def open_log(self, resumed: TrainState | None) -> RunLog:
        """Open the log in the run directory and write the recipe there; the first thing that a run writes.

        On resume it comes after `restore`, and the recipe after the log's sinks: what cannot go on is left as it was. Then
        the metrics are cut back to the checkpoint. A new run takes nothing over from a try that failed before its first
        step.

        Raises ConfigError or CheckpointError if the directory cannot be written.
        """
        directory, config = self.directory, self.config
        done = resumed.step if resumed else 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not resumed:
                shutil.rmtree(directory / START, ignore_errors=True)
            self.log = RunLog(
                directory, config.log, total_steps=config.run.steps, name=config.run.name,
                recipe=config.model_dump(mode="json"), done_steps=done,
            )  # fmt: skip
            replace_file(directory / "config.toml", to_toml(config))
        except OSError as error:
            if resumed:
                raise CheckpointError(
                    f"{directory / 'config.toml'} could not be written: {error}; the run is as it was: free some space or "
                    f"fix the permissions, and continue with: deepgrpo train --resume {directory}"
                ) from error
            raise ConfigError(f"run.dir: {directory} cannot be written: {error}; choose another with --run.dir") from error
        truncate(directory / "metrics.jsonl", done)
        self.place.listen(self.log.note)
        return self.log

    def describe(self) -> str:
        """What is about to be trained, in a line."""
        count = sum(p.numel() for p in self.policy.trainable().values())
        size = self.source.size
        parts = [
            f"{count / 1e6:.2f}M trainable parameters on {self.policy.device}",
            "endless prompts" if size is None else f"{size} prompts",
            f"explore {self.config.explore.type}",
            f"{self.directory}",
        ]
        verdict = self.policy.verdict
        if self.config.learner.tree_packing == "auto" and not verdict.packs:
            parts.append(f"one row per path ({verdict.reason}): every shared prefix is forwarded again for each branch")
        if not self.policy.plain_head:
            parts.append(f"log-probs from full logits ({self.policy.head_reason}): [tokens, vocabulary] is held at once")
        lines = [" · ".join(parts)]
        if where := self.place.describe():
            lines.append(where)
        if self.engine.remark:
            lines.append(self.engine.remark)
        skipped = ", ".join(f"{n} {reason}" for reason, n in self.source.skipped.items() if n)
        if skipped:
            lines.append(f"rows skipped: {skipped}")
        batch = self.config.run.prompts_per_step
        if size is not None and size < batch:
            lines.append(
                f"the data has {size} prompts and a step takes run.prompts_per_step = {batch}: "
                "some stand in a batch more than once"
            )
        return "\n".join(lines)

    def close(self) -> None:
        self.ahead.close()
        self.engine.close()
        self.reward.close()
        if self.eval_reward is not self.reward:
            self.eval_reward.close()


def open_run(config: Config, resume: Path | None, place: Place | None = None) -> Run:
    """Build all parts; nothing is written yet.

    Raises ConfigError if the run directory is in use, CheckpointError if there is nothing to resume, ModelError if the
    model cannot be loaded or cannot fit.
    """
    place = place or OneProcess()
    directory = resume or Path(config.run.dir) / config.run.name
    checkpoints = open_checkpoints(config, directory)
    if resume:
        _require_checkpoint(directory, checkpoints)
    else:
        refuse_used(directory, checkpoints)
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    # new adapters, and dropout where a model has it, draw from the global stream
    torch.manual_seed(config.run.seed)
    outline = outline_of(config)
    if outline is not None:
        place.check_room(config, outline)
    policy = build_policy(config, place.device(config))
    transformers_logging.disable_progress_bar()  # saving a checkpoint would draw a bar across the run's own
    limits = response_limits(config, policy)
    source = build_source(config.data, policy.tokenizer, seed=config.run.seed, context=limits.max_total_tokens)
    task = build_task(config.data)
    reward = place.reward(config, task)
    eval_prompts, eval_reward = held_out(config, policy, limits, reward)
    strategy = build_strategy(config.explore, scale=config.credit.scale, tokenizer=policy.tokenizer, task=task)
    signals = build_signals(policy, strategy)
    # last: engine and learner may start processes, which whoever has the run will close
    engine = place.engine(config, policy)
    # what is sampled ahead of its turn is by weights that the learner has left behind
    exact = engine.exact and config.sampling.top_p == 1.0 and not place.overlaps
    learner = place.learner(config, policy, exact_sampler=exact)
    return Run(
        config, directory, policy, source, strategy, engine, reward, eval_reward, eval_prompts, learner, checkpoints,
        HealthMonitor.from_config(config), limits, signals, place,
    )  # fmt: skip


def refuse_used(directory: Path, checkpoints: Checkpoints) -> None:
    """Raise ConfigError if a directory holds a run already. What failed before its first step is no run."""
    metrics = directory / "metrics.jsonl"
    if checkpoints.steps() or (metrics.exists() and metrics.stat().st_size):
        raise ConfigError(
            f"run.name: the directory {directory} already holds a run; choose another with --run.name NAME"
            + (
                f", or continue it with: deepgrpo train --resume {directory}"
                if checkpoints.steps()
                else "; or delete it, as it has no checkpoint to go on from"
            )
        )


def open_checkpoints(config: Config, directory: Path) -> Checkpoints:
    return Checkpoints(
        directory / "checkpoints", keep_last=config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best
    )


def outline_of(config: Config) -> Policy | None:
    """The policy of a recipe without its weights; None if its config alone does not tell (see `model/meta_policy.py`)."""
    model, learner = config.model, config.learner
    tokenizer = synthetic.tokenizer() if isinstance(model, ScratchModel) else load_tokenizer(model)
    policy = build_meta_policy(model, tokenizer, dtype=learner.dtype, logprob_chunk=learner.logprob_chunk)
    if policy is not None:
        _equip(policy, config)
    return policy


def build_policy(config: Config, device: str | None = None) -> Policy:
    """The policy of a recipe, on its device (or another)."""
    device = resolve_device(device or config.run.device)
    learner = config.learner
    if isinstance(config.model, ScratchModel):
        policy = scratch_policy(
            config.model, synthetic.tokenizer(), seed=config.run.seed, device=device, dtype=learner.dtype,
            logprob_chunk=learner.logprob_chunk,
        )  # fmt: skip
    else:
        assert isinstance(config.model, PretrainedModel)
        policy = load_policy(config.model, device=device, dtype=learner.dtype, logprob_chunk=learner.logprob_chunk)
    _equip(policy, config)
    if learner.tree_packing != "off":
        check_packing(config, policy.try_tree_packing())
    return policy


def _equip(policy: Policy, config: Config) -> None:
    """How the recipe wants it to learn."""
    policy.logprob_keep = config.learner.logprob_keep_mb * 2**20
    if config.learner.gradient_checkpointing:
        policy.checkpoint_activations()


def check_packing(config: Config, verdict: PackingVerdict) -> None:
    """Raise ModelError if the recipe insists on tree packs and the model cannot be packed."""
    if not verdict.packs and config.learner.tree_packing == "on":
        raise ModelError(
            f'learner.tree_packing is "on", but this model cannot be packed: {verdict.reason}; set it to "auto" or "off"'
        )


def _require_checkpoint(directory: Path, checkpoints: Checkpoints) -> None:
    if not checkpoints.steps():
        raise CheckpointError(
            f"{directory} holds no checkpoint to resume from; start the run anew: delete the directory, or choose "
            "another --run.name"
        )


def held_out(config: Config, policy: Policy, limits: Limits, reward: Reward) -> tuple[Sequence[Prompt], Reward]:
    """Held-out prompts and their reward; the training's own where the recipe does not name another."""
    wanted = config.eval
    if wanted.data is None or wanted.every is None:
        return (), reward
    source = build_source(
        wanted.data, policy.tokenizer, seed=config.run.seed, context=limits.max_total_tokens, shuffle=False
    )
    chosen = wanted.reward or config.reward
    shared = wanted.reward is None and not isinstance(chosen, TaskReward)
    return source.head(wanted.limit), reward if shared else build_reward(chosen, build_task(wanted.data))


def save_start(run: Run) -> None:
    """Keep the weights behind a warm start: a resumed run takes its KL reference from them."""
    aside = run.directory / f".tmp-{START}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    run.policy.save(aside)
    shutil.rmtree(run.directory / START, ignore_errors=True)  # a rename does not replace a directory
    aside.rename(run.directory / START)


def take_start(run: Run, directory: Path) -> None:
    """Begin from weights that another run has saved, and keep them as this run's own start.

    Raises ConfigError if there are none, ModelError if they do not fit the model.
    """
    remedy = "name the directory `start` of a run with a warm start, or a checkpoint's `model`"
    if not directory.is_dir():  # as a name on the hub it is not meant
        raise ConfigError(f"warmstart.from is {str(directory)!r}, which is no directory here; {remedy}")
    try:
        run.policy.load_weights(directory)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"warmstart.from is {str(directory)!r}, but no weights can be read there ({str(error).splitlines()[0]}); {remedy}"
        ) from error
    save_start(run)
