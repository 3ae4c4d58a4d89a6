"""A recipe with a section [cluster]: the loop of `train/loop.py`, with engine and learner in other processes.

The driver, which is this process, keeps the loop, the prompts, the rewards, a copy of the weights in its memory and the run
directory. It comes back by itself from the last checkpoint when a learner is lost; see docs/scaling.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deepgrpo.cluster.events import Events, LearnerLostError
from deepgrpo.cluster.session import require_ray, session
from deepgrpo.config import Config
from deepgrpo.engines.base import Engine
from deepgrpo.model.policy import Policy
from deepgrpo.prompts.tasks import Task
from deepgrpo.rewards import build_reward
from deepgrpo.rewards.base import Reward
from deepgrpo.train.backend import UpdatesPolicy
from deepgrpo.train.loop import train
from deepgrpo.train.memory import check_cluster_room
from deepgrpo.train.metrics import Metrics
from deepgrpo.train.setup import open_checkpoints


def train_on_cluster(config: Config, *, resume: Path | None = None) -> Path:
    """As `train.loop.train`, on Ray.

    Raises DeepGRPOError, as that does: ConfigError also for an address that does not answer and a cluster that is too
    small, EngineError if more processes are lost in a row than cluster.max_restarts.
    """
    assert config.cluster is not None
    require_ray()
    directory = resume or Path(config.run.dir) / config.run.name
    with session(config.cluster):
        place = RayPlace(config)
        try:
            while True:
                try:
                    return train(config, resume=resume, place=place)
                except LearnerLostError:
                    if open_checkpoints(config, directory).steps():
                        resume = directory
                    else:  # lost while the start was being saved: what it logged is said again
                        (directory / "metrics.jsonl").unlink(missing_ok=True)
        finally:
            place.close()


class RayPlace:
    """See `train.place.Place`. Rollout workers outlive a run that comes back; learners do not."""

    loses = True

    def __init__(self, config: Config) -> None:
        from deepgrpo.cluster.learners import LearnerGroup
        from deepgrpo.cluster.pool import WorkerPool
        from deepgrpo.cluster.session import Needs
        from deepgrpo.cluster.weight_store import WeightStore

        assert config.cluster is not None
        self.cluster = config.cluster
        self.overlaps, self.waves = config.cluster.overlap, config.cluster.waves
        self.needs = Needs(config)
        self.needs.check()
        self.events = Events(config.cluster.max_restarts)
        self.shelf = WeightStore(holds=self.overlaps)
        self.reward_nodes: list[str] = []
        self.pool: WorkerPool | None = None
        self.group: LearnerGroup | None = None

    def device(self, config: Config) -> str:
        return "cpu"

    def check_room(self, config: Config, outline: Policy) -> None:
        if self.pool is None:  # a run that comes back has rollout workers in memory, and did fit
            check_cluster_room(config, outline, cuda=self.needs.cuda)

    def engine(self, config: Config, policy: Policy) -> Engine:
        from deepgrpo.cluster.pool import WorkerPool

        if self.pool is None:
            self.pool = WorkerPool(config, self.needs, self.shelf, self.events)
        self.pool.reward_nodes = self.reward_nodes
        self.shelf.put(policy)
        return self.pool

    def reward(self, config: Config, task: Task | None) -> Reward:
        from deepgrpo.cluster.rewards import RewardPool

        if not self.cluster.reward_workers:
            return build_reward(config.reward, task)
        rewards = RewardPool(config, task, self.events)
        self.reward_nodes = rewards.nodes
        return rewards

    def learner(self, config: Config, policy: Policy, *, exact_sampler: bool) -> UpdatesPolicy:
        from deepgrpo.cluster.learners import LearnerGroup

        if self.group is not None:
            self.group.close()
        self.group = LearnerGroup(config, policy, self.needs, self.shelf, self.events, exact_sampler=exact_sampler)
        assert self.pool is not None
        self.pool.learner_nodes = [hello.node for hello in self.group.hellos]
        return self.group

    def listen(self, note: Callable[[str], None]) -> None:
        self.events.note = note

    def begin_step(self) -> None:
        assert self.pool is not None
        self.pool.tend()
        self.shelf.renew()

    def metrics(self) -> Metrics:
        assert self.pool is not None
        self.events.step_done()
        return {
            "cluster/rollout_workers": float(len(self.pool.workers)),
            **{f"cluster/{kind}": float(count) for kind, count in self.events.counts.items()},
        }

    def describe(self) -> str | None:
        from deepgrpo.cluster.session import nodes

        backend = "NCCL" if self.needs.cuda else "gloo"
        count = len(nodes())
        return (
            f"cluster of {count} node{'s' if count > 1 else ''}: {self.cluster.rollout_workers} rollout workers, "
            f"{self.cluster.learners} learners ({self.cluster.sharding}, {backend})"
            + (f", {self.cluster.reward_workers} reward workers" if self.cluster.reward_workers else "")
            + (f", batches grown in {self.waves} waves" if self.waves > 1 else "")
            + (", each batch sampled while the one before is learned from" if self.overlaps else "")
        )

    def close(self) -> None:
        if self.group is not None:
            self.group.close()
        if self.pool is not None:
            self.pool.end()
