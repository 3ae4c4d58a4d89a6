"""The Ray backend: the loop of `train/loop.py`, with engine and learners in other processes.

This process, the driver, keeps the loop, the prompts, the rewards, a copy of the weights in host memory and the run
directory. If a learner is lost, it resumes from the last checkpoint by itself; see docs/scaling.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deepgrpo.cluster.events import Events, LearnerLostError
from deepgrpo.cluster.session import Resources, nodes, session
from deepgrpo.config import Config
from deepgrpo.ledger import StepReport
from deepgrpo.model.policy import Policy
from deepgrpo.prompts.tasks import Task
from deepgrpo.rewards import build_reward
from deepgrpo.rewards.base import Reward
from deepgrpo.runs.layout import RunDir
from deepgrpo.train.backend import Parts
from deepgrpo.train.build import SamplerBuilder, build_sampler
from deepgrpo.train.loop import steps
from deepgrpo.train.metrics import Metrics
from deepgrpo.train.room import check_cluster_room
from deepgrpo.train.watch import Watcher

if TYPE_CHECKING:  # these import Ray
    from deepgrpo.cluster.learners import LearnerGroup
    from deepgrpo.cluster.pool import WorkerPool


def train_on_cluster(config: Config, *, resume: Path | None = None, step: int | None = None) -> Path:
    """Train a recipe on Ray; see `train.loop.train`.

    Raises DeepGRPOError: ConfigError also for an address that does not answer and a cluster that is too small, EngineError
    if more than `cluster.max_restarts` processes are lost in a row.
    """
    for _ in steps_on_cluster(config, resume=resume, step=step):
        pass
    return (resume or RunDir.of(config.run).path).absolute()


def steps_on_cluster(
    config: Config, *, resume: Path | None = None, step: int | None = None, watcher: Watcher | None = None, show: bool = True
) -> Iterator[StepReport]:
    """`train_on_cluster`, as an iterator over the reports of its steps; see `train.loop.steps`."""
    assert config.cluster is not None
    directory = resume or RunDir.of(config.run).path
    with session(config.cluster):
        backend = RayBackend(config)
        try:
            while True:
                try:
                    yield from steps(config, resume=resume, step=step, backend=backend, watcher=watcher, show=show)
                    return
                except LearnerLostError:
                    resume, step = directory, None
        finally:
            backend.close()


def travelling(config: Config) -> Config:
    """The recipe for other processes, without the rows and the strategy that it may hold: only the driver needs them."""
    held_out = config.eval.data and config.eval.data.holding(None)
    driven = {"data": config.data.holding(None), "explore": config.explore.holding(None)}
    return config.model_copy(update={**driven, "eval": config.eval.model_copy(update={"data": held_out})})


class RayBackend:
    """The backend of a recipe with a section [cluster] (`train.backend.Backend`).

    Rollout workers outlive a run that resumes after the loss of a learner; learners and reward workers do not.

    Args:
        sampler: builds the engine of each rollout worker.
    """

    def __init__(self, config: Config, sampler: SamplerBuilder = build_sampler) -> None:
        from deepgrpo.cluster.weight_store import WeightStore

        assert config.cluster is not None
        self.config, self.cluster, self.sampler = travelling(config), config.cluster, sampler
        self.resources = Resources(config.cluster, config.run.device)
        self.resources.check()
        self.events = Events(config.cluster.max_restarts)
        self.store = WeightStore(hold=config.cluster.overlap)
        self.pool: WorkerPool | None = None
        self.group: LearnerGroup | None = None

    def prepare(self, config: Config, shapes: Policy | None) -> str:
        """See `train.backend.Backend.prepare`. The driver's policy stays on the CPU."""
        if shapes is not None and self.pool is None:  # a resumed run has rollout workers in memory, and did fit
            check_cluster_room(config, shapes, cuda=self.resources.cuda)
        return "cpu"

    def open(self, config: Config, policy: Policy, task: Task | None) -> Parts:
        """See `train.backend.Backend.open`."""
        from deepgrpo.cluster.learners import LearnerGroup

        config = travelling(config)
        reward, reward_nodes = self._reward(config, task)
        pool = self.open_pool(policy)
        pool.reward_nodes = reward_nodes
        if self.group is not None:
            self.group.close()
        # prefetched batches are sampled with older weights than the learner's
        exact = pool.exact and config.sampling.of_the_policy and not self.cluster.overlap
        self.group = LearnerGroup(config, policy, self.resources, self.store, self.events, exact_sampler=exact)
        pool.learner_nodes = [each.node for each in self.group.ready]
        return Parts(
            pool, self.group, reward, overlaps=self.cluster.overlap, loses_learners=True,
            description=self._describe(pool.threads, self.group.ready[0].threads), begin_step=self.begin_step,
            metrics=self._metrics, listen=self._listen,
        )  # fmt: skip

    def open_pool(self, policy: Policy) -> WorkerPool:
        """Start the rollout workers unless they are running; they sample with the policy's weights."""
        from deepgrpo.cluster.pool import WorkerPool

        if self.pool is None:
            self.pool = WorkerPool(self.config, self.resources, self.store, self.events, sampler=self.sampler)
        self.store.put(policy)
        return self.pool

    def begin_step(self) -> None:
        """Replace lost workers and use the newest weights: nothing is being sampled."""
        assert self.pool is not None
        self.pool.refresh()
        self.store.use_newest()

    def close(self) -> None:
        """End learners and rollout workers."""
        if self.group is not None:
            self.group.close()
        if self.pool is not None:
            self.pool.stop()

    def _reward(self, config: Config, task: Task | None) -> tuple[Reward, list[str]]:
        """Build the reward; also return the nodes of its workers."""
        from deepgrpo.cluster.rewards import RewardPool

        if not self.cluster.reward_workers:
            return build_reward(config.reward, task), []
        rewards = RewardPool(config, task, self.events)
        return rewards, rewards.nodes

    def _describe(self, of_worker: int, of_learner: int) -> str:
        cluster, count = self.cluster, len(nodes())
        return (
            f"cluster of {count} node{'s' if count > 1 else ''}: {cluster.rollout_workers} rollout workers, "
            f"{cluster.learners} learners ({cluster.sharding}, {'NCCL' if self.resources.cuda else 'gloo'})"
            + f", threads: {of_worker} per rollout worker, {of_learner} per learner"
            + (f", {cluster.reward_workers} reward workers" if cluster.reward_workers else "")
            + (", each batch sampled during the update on the previous one" if cluster.overlap else "")
        )

    def _metrics(self) -> Metrics:
        assert self.pool is not None
        self.events.step_done()
        return {
            "cluster/rollout_workers": float(len(self.pool.workers)),
            **{f"cluster/{kind}": float(count) for kind, count in self.events.counts.items()},
        }

    def _listen(self, note: Callable[[str], None]) -> None:
        self.events.note = note
