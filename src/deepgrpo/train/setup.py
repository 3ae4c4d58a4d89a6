"""Build everything that a run needs once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from deepgrpo.config import Config, GivenModel
from deepgrpo.engines.base import Engine, SamplingParams
from deepgrpo.errors import first_line
from deepgrpo.explore.base import Limits, Signals, Strategy
from deepgrpo.explore.episodes import Episodes
from deepgrpo.explore.grow import Judge
from deepgrpo.model.adapters import has_adapters
from deepgrpo.model.bfloat16 import slow_dtype
from deepgrpo.model.device import use_threads
from deepgrpo.model.policy import Policy
from deepgrpo.prompts.curriculum import Curriculum, StepDraw, check_memory
from deepgrpo.prompts.fingerprint import Fingerprint, check_unchanged, fingerprint_of
from deepgrpo.prompts.source import Cursor, PromptSource
from deepgrpo.records import Prompt, Tree
from deepgrpo.rewards.base import Reward, judge
from deepgrpo.rewards.overlong import OverlongPenalty
from deepgrpo.runs.checkpoints import Checkpoints, TrainState, unreadable
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.resume import resume_command
from deepgrpo.threads import Threads
from deepgrpo.train.backend import Backend, LocalBackend, Parts, UpdatesPolicy
from deepgrpo.train.build import build_policy, build_shapes
from deepgrpo.train.directory import open_log
from deepgrpo.train.health import HealthMonitor
from deepgrpo.train.health_state import HealthState
from deepgrpo.train.inputs import build_inputs
from deepgrpo.train.log import RunLog
from deepgrpo.train.origin import Origin, new_origin, resumed_origin
from deepgrpo.train.prefetch import Prefetch
from deepgrpo.train.questions import skipped_lines
from deepgrpo.train.signals import build_signals
from deepgrpo.train.start import fingerprint, load_start, rebuild_start, save_start
from deepgrpo.train.watch import Watcher


@dataclass(frozen=True, slots=True)
class Reached:
    """A state between two optimizer steps, with torch's random state: all that a checkpoint needs besides the weights."""

    state: TrainState
    random: torch.Tensor


@dataclass
class Run:
    """The parts of a run. What changes between steps is in `TrainState`, apart from weights and moments."""

    config: Config
    directory: Path
    """The run directory as the user named it, for messages."""
    paths: RunDir
    """The same from the root: a user's code may change the working directory."""
    origin: Origin
    policy: Policy
    source: PromptSource
    strategy: Strategy
    parts: Parts
    """Engine, learner and reward, opened by the backend."""
    eval_reward: Reward
    eval_prompts: Sequence[Prompt]
    checkpoints: Checkpoints
    monitor: HealthMonitor
    limits: Limits
    threads: Threads
    signals: Signals | None = None
    """Computes the per-token signals that the strategy requests; None if it requests none."""
    episodes: Episodes | None = None
    """Plays episodes with the environment; None without one."""
    prefetch: Prefetch = field(default_factory=Prefetch)
    """The next batch, if the backend samples it during an update."""
    reached: Reached | None = None
    """The newest state, which is saved if the run fails."""
    updating: bool = False
    """True during an update."""
    curriculum: Curriculum | None = None
    """Draws the prompts by weight; None: all prompts are taken in turn."""
    eval_source: PromptSource | None = None
    """Source of the held-out prompts; None without an evaluation."""
    remarks: list[str] = field(default_factory=list)
    """Lines for `describe`, found on the way."""
    watcher: Watcher = field(default_factory=Watcher)
    """Is told what the run has done."""
    grown: Sequence[Tree] = ()
    """Trees of the newest step."""
    log: RunLog = field(init=False)
    """Set by `open_log`."""

    @property
    def engine(self) -> Engine:
        return self.parts.engine

    @property
    def learner(self) -> UpdatesPolicy:
        return self.parts.learner

    @property
    def judge(self) -> Judge:
        return functools.partial(judge, self.parts.reward, self.config.reward.truncated_value, penalty=self.overlong)

    @property
    def overlong(self) -> OverlongPenalty | None:
        """The length penalty of the training reward, if the recipe has one; evaluations have none."""
        wanted, limits = self.config.reward.overlong, self.limits
        return None if wanted is None else OverlongPenalty(wanted, limits.max_new_tokens, limits.max_total_tokens)

    @property
    def decode(self) -> Callable[[Sequence[int]], str]:
        return lambda tokens: self.policy.tokenizer.decode(tokens, skip_special_tokens=True)

    @property
    def sampling_params(self) -> SamplingParams:
        return SamplingParams.of(self.config.sampling)

    def draw(self, state: TrainState) -> StepDraw | None:
        """The prompts that the curriculum draws for the step after a state; None without a curriculum."""
        if self.curriculum is None:
            return None
        return self.curriculum.draw(state.curriculum, state.step + 1, Cursor.from_dict(state.cursor))

    @property
    def go_on(self) -> str:
        """The command or call that continues this run."""
        return resume_command(RunDir(self.directory), recipe=self.config)

    def reach(self, state: TrainState) -> None:
        """Note the state that belongs to the present weights."""
        self.reached = Reached(state, torch.get_rng_state())

    def begin(self) -> TrainState:
        """Freeze the KL reference at the present weights; return the state before the first step."""
        # whether the warm start was done in this process or read from disk
        torch.manual_seed(self.config.run.seed)
        self.learner.freeze_reference()
        given = isinstance(self.config.model, GivenModel) and self.config.warmstart is None
        if given and self.config.loss.beta > 0 and not has_adapters(self.policy.model):
            save_start(self.policy, self.paths)
        return TrainState(
            cursor=Cursor().to_dict(), strategy=self.strategy.initial_state(), health=HealthState().as_dict(),
            start_weights=fingerprint(self.policy), data=self.fingerprints(),
        )  # fmt: skip

    def fingerprints(self) -> dict[str, Fingerprint]:
        """Fingerprints of the training and of the held-out prompts, by their section."""
        held_out = self.config.eval.data
        found = {"data": fingerprint_of(self.config.data, self.source)}
        if held_out is not None and self.eval_source is not None:
            found["eval.data"] = fingerprint_of(held_out, self.eval_source)
        return found

    def on_same_data(self, state: TrainState) -> TrainState:
        """Check the data of a resumed run against its checkpoint. Raises CheckpointError, see `check_unchanged`."""
        now = self.fingerprints()
        for key, data in (("data", self.config.data), ("eval.data", self.config.eval.data)):
            changed = check_unchanged(key, data, state.data.get(key), now[key]) if data and key in now else None
            self.remarks += [changed] if changed else []
        return replace(state, data=now)

    def restore(self) -> TrainState:
        """Load weights, moments and state of the origin. The KL reference is the start model.

        Raises CheckpointError if the checkpoint or the start model is damaged, missing, or does not fit the recipe.
        """
        if self.origin.kind == "start":
            load_start(self.policy, self.paths)
        checkpoint = self.origin.checkpoint
        if checkpoint is None:
            return self.begin()
        saved = checkpoint.read_state()
        rebuild_start(self.policy, saved.start_weights, self.config, self.paths)
        self.learner.freeze_reference()
        state = self.checkpoints.load(checkpoint, self.policy, self.learner)
        try:  # a state of another strategy or version
            Cursor.from_dict(state.cursor)
            health = HealthState.from_dict(state.health)
            if not isinstance(health.dead, int) or not isinstance(health.empty, int):
                raise TypeError("health has no counts")
            self.strategy.report(state.strategy)
            check_memory(state.curriculum, self.source.size or 0)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise unreadable(
                checkpoint, ValueError(f"its state does not fit the recipe ({type(error).__name__}: {first_line(error)}); "
                "was explore.type changed?"),
            ) from error
        return self.on_same_data(state)

    def open_log(self, *, show: bool = True) -> RunLog:
        """See `directory.open_log`."""
        self.log = open_log(self.paths, self.config, self.origin, self.checkpoints, show=show)
        self.parts.listen(self.log.note)
        return self.log

    def describe(self) -> str:
        """Describe the run in one line, and what deserves attention in further lines."""
        count = sum(p.numel() for p in self.policy.trainable().values())
        base = " over a base in 16 bits" if self.policy.narrow else ""
        size = self.source.size
        facts = [
            f"{f'{count / 1e6:.2f}M' if count >= 10_000 else f'{count:,}'} trainable parameters{base} on {self.policy.device}",
            str(self.threads),
            self.source.described,
            f"explore {self.config.explore.type}",
            f"{self.directory}",
        ]
        verdict = self.policy.verdict
        if self.config.learner.tree_packing == "auto" and not verdict.packs:
            facts.append(f"one row per path ({verdict.reason}): every shared prefix is forwarded again for each branch")
        if not self.policy.plain_head:
            facts.append(f"log-probs from full logits ({self.policy.head_reason}): [tokens, vocabulary] is held at once")
        lines = [" · ".join(facts)]
        if self.parts.description:
            lines.append(self.parts.description)
        if self.engine.remark:
            lines.append(self.engine.remark)
        if slow := slow_dtype(self.policy.dtype, self.policy.device):
            lines.append(slow)
        lines += skipped_lines(self.source, self.eval_source) + self.remarks
        batch = self.config.run.prompts_per_step
        if size is not None and size < batch:
            lines.append(
                f"the data has {size} prompts and a step takes run.prompts_per_step = {batch}: "
                "some occur more than once in a batch"
            )
        taken = self.config.run.steps * batch
        if self.config.explore.needs_epochs and size is not None and taken <= size:
            lines.append(
                f'explore.type = "{self.config.explore.type}" branches where a prompt comes again, but the run takes {taken} '
                f"prompts of {size}, each once: raise run.steps, or lower data.limit or data.size"
            )
        return "\n".join(lines)

    def close(self) -> None:
        self.prefetch.close()
        self.parts.close()
        if self.eval_reward is not self.parts.reward:
            self.eval_reward.close()
        if self.episodes is not None:
            self.episodes.close()


def open_run(config: Config, resume: Path | None, backend: Backend | None = None, *, step: int | None = None) -> Run:
    """Build all parts of a run; nothing is written yet.

    Args:
        resume: the run directory to continue.
        step: the checkpoint to continue from; default: the newest.

    Raises ConfigError if the run directory is in use, CheckpointError if there is nothing to resume, ModelError if the
    model cannot be loaded or cannot fit in memory.
    """
    backend = backend or LocalBackend()
    directory = resume or RunDir.of(config.run).path
    paths = RunDir(directory.absolute())
    checkpoints = Checkpoints(paths, keep_last=config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best)
    place = RunDir(directory)
    origin = resumed_origin(place, step, config) if resume else new_origin(place, overwrite=config.run.overwrite)
    shapes = build_shapes(config)
    threads = use_threads(shapes.model if shapes else None, config.run.threads)
    # new adapters, and the dropout of some models, draw from torch's global stream
    torch.manual_seed(config.run.seed)
    policy = build_policy(config, backend.prepare(config, shapes))
    if shapes is None:
        threads = use_threads(policy.model, config.run.threads)
    if config.cluster is None:  # a resumed run keeps its number; those of a cluster's processes follow from its section
        config = config.model_copy(update={"run": config.run.model_copy(update={"threads": threads.number})})
    transformers_logging.disable_progress_bar()  # saving a checkpoint would draw a bar across the run's own
    inputs = build_inputs(config, policy)
    config, strategy = inputs.config, inputs.strategy
    # last, because it may start processes, which the caller ends by closing the run
    parts = backend.open(config, policy, inputs.task)
    critic = replace(inputs.critic, engine=parts.engine)
    signals = build_signals(policy, strategy, config.learner.tokens_per_pack, critic, parts.learner.likelihood)
    return Run(
        config, directory, paths, origin, policy, inputs.source, strategy, parts, inputs.eval_reward or parts.reward,
        inputs.eval_prompts, checkpoints, HealthMonitor.from_config(config), inputs.limits, threads, signals, inputs.episodes,
        eval_source=inputs.eval_source, curriculum=inputs.curriculum,
    )  # fmt: skip
