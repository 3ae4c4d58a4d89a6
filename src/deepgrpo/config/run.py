"""Sections `run`, `eval`, `checkpoint`, `log` and `cluster`."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from deepgrpo.config.base import PathText, Section
from deepgrpo.config.curriculum import sampling_of
from deepgrpo.config.data import DataConfig
from deepgrpo.config.reward import RewardConfig


class EvalConfig(Section):
    """Evaluation during training, on held-out questions."""

    every: PositiveInt | None = None
    """Steps between evaluations (and before the first and after the last step); none, and no `every_tokens`: no evaluation."""
    every_tokens: PositiveInt | None = None
    """Instead: sampled tokens between evaluations. One follows the first step that reaches a multiple (and before the first
    and after the last step), so runs with steps of different size are evaluated at the same marks."""
    data: DataConfig | None = None
    """The held-out questions."""
    limit: PositiveInt = 256
    """Questions per evaluation."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Sampled responses per question, besides the greedy one (0: greedy only)."""
    k: tuple[PositiveInt, ...] = ()
    """pass@k for these k; each at most `samples`."""
    reward: RewardConfig | None = None
    """Reward for evaluation; default: the training reward."""

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalConfig:
        if self.k and max(self.k) > self.samples:
            raise ValueError(
                f"eval.k has {max(self.k)}, but eval.samples is {self.samples}: pass@k needs at least k samples; "
                "raise eval.samples or drop that k"
            )
        if self.every is not None and self.every_tokens is not None:
            raise ValueError(
                f"eval.every is {self.every} and eval.every_tokens is {self.every_tokens}; they are two ways to say when to "
                'evaluate: set one of them to "none"'
            )
        if self.scheduled and self.data is None:
            key, value = ("every", self.every) if self.every else ("every_tokens", self.every_tokens)
            raise ValueError(f"eval.{key} is {value}, but eval.data is missing; add a table [eval.data]")
        if (sampling := sampling_of(self.data)) != "uniform":
            raise ValueError(
                f'eval.data.sampling is "{sampling}", but an evaluation asks every question once; remove it there'
            )
        if self.reward is not None and self.reward.overlong is not None:
            raise ValueError(
                f"eval.reward.overlong is set (cache {self.reward.overlong.cache}), but an evaluation measures the answer "
                "alone; remove it there"
            )
        return self

    @property
    def scheduled(self) -> bool:
        """True if the run evaluates at all."""
        return self.every is not None or self.every_tokens is not None

    def due(self, step: int, tokens_before: int, tokens: int) -> bool:
        """True if an evaluation follows this step.

        Args:
            tokens_before, tokens: sampled tokens of the run before and after the step.

        >>> section = EvalConfig.model_construct(every_tokens=1000)
        >>> [section.due(step, *tokens) for step, tokens in [(1, (0, 999)), (2, (999, 1000)), (3, (1000, 3500))]]
        [False, True, True]
        """
        if self.every_tokens is not None:
            return tokens // self.every_tokens > tokens_before // self.every_tokens
        return self.every is not None and step % self.every == 0


class CheckpointConfig(Section):
    """Checkpoints, written to a temporary name and renamed: one that exists is complete."""

    every: PositiveInt | None = 50
    """Steps between checkpoints (one is always written at the end and on Ctrl-C); none: only then."""
    keep_last: PositiveInt = 2
    """Checkpoints to keep; older ones are deleted."""
    keep_best: bool = True
    """Also keep the checkpoint with the best greedy accuracy: a new best is saved at once, unless `every` is none."""


class LogConfig(Section):
    """Logging in addition to metrics.jsonl, which is always written."""

    tensorboard: bool = False
    """Write TensorBoard event files (needs the extra `tensorboard`)."""
    wandb: bool = False
    """Send the metrics to Weights & Biases (needs the extra `wandb`)."""
    trackio: bool = False
    """Send the metrics to trackio (needs the extra `trackio`)."""
    project: str = "deepgrpo"
    """Project name for wandb and trackio."""
    responses: Annotated[int, Field(ge=0)] = 8
    """Responses of a step that the trackers show in a table, with their rewards."""
    responses_every: PositiveInt | None = 10
    """Steps between such tables; none: never. Histograms of rewards, lengths and depths of pivots come with every step."""
    trees_every: PositiveInt | None = 10
    """Steps between saved trees (trees/step-*.jsonl.gz); none: save no trees."""
    dead_steps: PositiveInt = 10
    """Warn after this many steps without a mixed group."""
    few_branches: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Warn after `dead_steps` steps with full lambda for fewer branch rows than this share of the main rows; 0: never."""


class RunConfig(Section):
    """Name, length and seed of the run."""

    name: str = "run"
    """Directory of the run inside `dir`; "sweep/a" is nested."""
    dir: PathText = "runs"
    """Directory that holds the runs."""
    overwrite: bool = False
    """Delete a run that the directory already holds, at the start of a new one; a resumed run is never deleted."""
    seed: int = 0
    """Random seed for prompts, rollouts and pivots."""
    steps: Annotated[int, Field(ge=0)] = 100
    """Training steps (batches of prompts); 0: only the warm start and the first evaluation."""
    epochs: PositiveInt | None = None
    """Stop before a step once this many passes over the prompts are done. Without `steps`, they set the number of steps."""
    max_sampled_tokens: PositiveInt | None = None
    """Stop before a step once this many tokens have been sampled in total."""
    prompts_per_step: PositiveInt = 64
    """Prompts in a batch."""
    device: str = "auto"
    """auto (cuda if available, else cpu), cpu, cuda, cuda:1, ...; also xpu and mps, which were never run and are tried against
    the CPU at load."""
    threads: PositiveInt | None = None
    """CPU threads of torch, which change how sums are rounded; none: $OMP_NUM_THREADS, else one per 100,000 parameters of the
    model, at most one per available CPU. The number is saved with the run and kept on resume."""

    @property
    def unset(self) -> frozenset[str]:
        return frozenset({"steps"}) if self.epochs is not None and "steps" not in self.model_fields_set else frozenset()

    @field_validator("name")
    @classmethod
    def _inside_dir(cls, name: str) -> str:
        path = PurePath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name or name.startswith("~"):
            raise ValueError(
                f"run.name is {name!r}; it names a directory inside run.dir, so it cannot be empty, absolute or lead "
                "upwards; choose a plain name, and the place with run.dir"
            )
        return name


class ClusterConfig(Section):
    """Several processes on one or many machines, by Ray (needs the extra `cluster`); none: a single process."""

    address: str | None = None
    """HOST:PORT of a running Ray cluster, or "auto" for the one on this machine; none: start Ray on this machine only."""
    rollout_workers: PositiveInt = 1
    """Sampling processes, each with the whole model."""
    learners: PositiveInt = 1
    """Learner processes, which compute each update together."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each learner holds the whole model and all moments. fsdp: each holds a shard of both (FSDP2)."""
    reward_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that score responses, each with its own reward (including its `reward.workers`); 0: the driver scores. The
    file of a user's function must exist on every machine."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs reserved per rollout worker, and its threads unless run.threads is set."""
    cpus_per_learner: PositiveFloat = 1.0
    """CPUs reserved per learner, and its threads unless run.threads is set."""
    cpus_per_reward_worker: PositiveFloat = 1.0
    """CPUs reserved per reward worker."""
    gpus_per_worker: PositiveFloat | None = None
    """GPUs per rollout worker, below 1 to share one; none: 1 with CUDA, else 0."""
    gpus_per_learner: PositiveFloat | None = None
    """GPUs per learner, below 1 to share one with a rollout worker, above 0.5 if there are several learners: no two of them can
    share one; none: 1 with CUDA, else 0."""
    start_deadline_s: PositiveFloat = 600.0
    """Time limit for a process to load the model, in seconds; sharded learners, which wait for each other, get it twice."""
    sample_deadline_s: PositiveFloat = 1800.0
    """Time limit for a rollout worker's part of a round, in seconds; after that it is replaced."""
    reward_deadline_s: PositiveFloat = 600.0
    """Time limit for a reward worker's part of a round, in seconds; after that it is restarted."""
    update_deadline_s: PositiveFloat = 1800.0
    """Time limit for an update or a checkpoint, in seconds; after that the run resumes from its last checkpoint."""
    max_restarts: Annotated[int, Field(ge=0)] = 5
    """Lost processes in a row, without a completed step between them, before the run fails."""
    overlap: bool = False
    """Sample the next batch while the learners work on this one. Its weights are one update old; importance weights
    compensate."""

    def check(self, recipe: Any) -> None:
        if recipe.run.device.startswith(("mps", "xpu")):
            raise ValueError(
                f'run.device is "{recipe.run.device}" with a section [cluster], whose processes run on cpu or cuda; change one '
                "of the two"
            )
        if recipe.run.device != "cpu" and self.learners > 1 and (self.gpus_per_learner or 1.0) <= 0.5:
            raise ValueError(
                f"cluster.gpus_per_learner is {self.gpus_per_learner}, so two of cluster.learners = {self.learners} may get "
                "the same GPU, over which NCCL cannot connect them; set it above 0.5, and cluster.gpus_per_worker to the rest"
            )
        if self.overlap and recipe.loss.importance == "off":
            raise ValueError(
                'cluster.overlap is on and loss.importance is "off": nothing would make up for rollouts that are one update '
                'old; set loss.importance = "auto"'
            )
