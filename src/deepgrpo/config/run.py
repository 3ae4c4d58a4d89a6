"""Sections `run`, `eval`, `checkpoint`, `log` and `cluster`."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from deepgrpo.config.base import Section
from deepgrpo.config.data import DataConfig
from deepgrpo.config.reward import RewardConfig


class EvalConfig(Section):
    """Evaluation during training, on questions that are never trained on."""

    every: PositiveInt | None = None
    """Steps between evaluations (also before the first and after the last step); absent: none."""
    data: DataConfig | None = None
    """The held-out questions."""
    limit: PositiveInt = 256
    """Questions per evaluation."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Sampled responses per question beside the greedy one (0: greedy only)."""
    k: tuple[PositiveInt, ...] = ()
    """pass@k for these k; each at most `samples`."""
    reward: RewardConfig | None = None
    """Reward of the evaluation; default: that of the training."""

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalConfig:
        if self.k and max(self.k) > self.samples:
            raise ValueError(
                f"eval.k has {max(self.k)}, but eval.samples is {self.samples}: pass@k needs at least k samples; "
                "raise eval.samples or drop that k"
            )
        if self.every is not None and self.data is None:
            raise ValueError(f"eval.every is {self.every}, but eval.data is missing; add a table [eval.data]")
        return self


class CheckpointConfig(Section):
    """Checkpoints are written aside and renamed: one that exists is whole."""

    every: PositiveInt | None = 50
    """Steps between checkpoints (one is always written at the end and on Ctrl-C); absent: only then."""
    keep_last: PositiveInt = 2
    """Older checkpoints are deleted."""
    keep_best: bool = True
    """Keep the best evaluation (greedy accuracy) as well: a new best is saved at once, unless `every` is absent."""


class LogConfig(Section):
    """metrics.jsonl is always written; these come on top."""

    tensorboard: bool = False
    """Write TensorBoard event files (needs the extra `tensorboard`)."""
    wandb: bool = False
    """Send the metrics to Weights & Biases (needs the extra `wandb`)."""
    trackio: bool = False
    """Send the metrics to trackio (needs the extra `trackio`)."""
    project: str = "deepgrpo"
    """Project name for wandb and trackio."""
    trees_every: PositiveInt | None = 10
    """Steps between saved trees (trees/step-*.jsonl.gz); absent: none."""
    dead_steps: PositiveInt = 10
    """Warn when no group was mixed for this many steps."""


class RunConfig(Section):
    """Name, length and seed of the run."""

    name: str = "run"
    """Directory of the run inside `dir`; "sweep/a" is one inside another."""
    dir: str = "runs"
    """Directory that holds the runs."""
    seed: int = 0
    """The same seed draws the same prompts, rollouts and pivots."""
    steps: Annotated[int, Field(ge=0)] = 100
    """Training steps (batches of prompts); 0: the warm start and the first evaluation alone."""
    max_sampled_tokens: PositiveInt | None = None
    """Stop before a step once this many tokens have been sampled in all."""
    prompts_per_step: PositiveInt = 64
    """Prompts in a batch."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:1, ..."""
    threads: PositiveInt | None = None
    """CPU threads of torch; default: torch's own choice."""

    @field_validator("name")
    @classmethod
    def _inside_dir(cls, name: str) -> str:
        path = PurePath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(
                f"run.name is {name!r}; it names a directory inside run.dir, so it cannot be empty, absolute or lead "
                "upwards; choose a plain name, and the place with run.dir"
            )
        return name


class ClusterConfig(Section):
    """Several processes on one or many machines, by Ray (needs the extra `cluster`); absent: one process does everything."""

    address: str | None = None
    """HOST:PORT of a running Ray cluster, or "auto" for the one on this machine; absent: start a Ray on this machine alone."""
    rollout_workers: PositiveInt = 1
    """Processes that sample, each with the whole model."""
    learners: PositiveInt = 1
    """Processes that learn, together."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each learner has the whole model and all moments. fsdp: each has a shard of both (FSDP2)."""
    reward_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that check responses, each with a reward of its own (`reward.workers` included); 0: the driver does. A file
    with a user's function must be there on every machine."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that Ray sets aside for a rollout worker."""
    cpus_per_learner: PositiveFloat = 1.0
    """CPUs that Ray sets aside for a learner."""
    cpus_per_reward_worker: PositiveFloat = 1.0
    """CPUs that Ray sets aside for a reward worker."""
    gpus_per_worker: PositiveFloat | None = None
    """GPUs for a rollout worker, below 1 to share one; absent: 1 with CUDA, else 0."""
    gpus_per_learner: PositiveFloat | None = None
    """GPUs for a learner, below 1 to share one with a rollout worker; absent: 1 with CUDA, else 0."""
    start_deadline_s: PositiveFloat = 600.0
    """Seconds that a process may take until it has the model; learners with shards get it when all are there, as long again."""
    sample_deadline_s: PositiveFloat = 1800.0
    """Seconds that a rollout worker may take for its part of a round; then it is replaced."""
    reward_deadline_s: PositiveFloat = 600.0
    """Seconds that a reward worker may take for its part of a round; then it is started anew."""
    update_deadline_s: PositiveFloat = 1800.0
    """Seconds that the learners may take for an update or a checkpoint; then the run comes back from its last checkpoint."""
    max_restarts: Annotated[int, Field(ge=0)] = 5
    """Processes lost in a row, without a step done between them, before the run gives up."""
    overlap: bool = False
    """Sample the next batch while the learners work on this one: by weights that are one update old, which the importance
    weight makes up for."""
