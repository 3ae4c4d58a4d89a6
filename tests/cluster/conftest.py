"""A Ray of two nodes, the run of one process, and rollout workers that runs share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from commands import SHARED, once
from ray_workers import RayWorkers

from cluster_runs import NODE, recipe

if TYPE_CHECKING:
    from deepgrpo.cluster.pool import WorkerPool
    from deepgrpo.cluster.run import RayBackend


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others are compared with: one process, undisturbed. One for all workers of the session."""
    from deepgrpo.train.loop import train

    directory = Path(os.environ[SHARED])
    with once(directory, "alone") as missing:
        if missing:
            shutil.move(train(recipe(tmp_path_factory.mktemp("alone"), "run")), directory / "alone")
    return directory / "alone"


@pytest.fixture(scope="module")
def forks() -> RayWorkers:
    return RayWorkers()


@pytest.fixture(scope="module")
def two_nodes(forks: RayWorkers) -> Iterator[Any]:
    """A cluster of two nodes with three and two CPUs, on this machine."""
    from deepgrpo.cluster.session import require_ray

    ray = require_ray()
    from ray.cluster_utils import Cluster

    head = {**NODE, "num_cpus": 3, "include_dashboard": False, "no_monitor": True}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def pools(two_nodes: Any) -> Iterator[list[WorkerPool]]:
    """The rollout workers that undisturbed runs share: two of them, as loading torch is most of what a run here costs."""
    running: list[WorkerPool] = []
    yield running
    for pool in running:
        pool.stop()


@pytest.fixture
def shared(two_nodes: Any, pools: list[WorkerPool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs find rollout workers of the runs before them, and leave them running."""
    from deepgrpo.cluster.pool import WorkerPool
    from deepgrpo.cluster.routing import RolloutIndex
    from deepgrpo.cluster.run import RayBackend

    start = RayBackend.open_pool

    def open_pool(self: RayBackend, policy: Any) -> WorkerPool:
        if not pools:
            pools.append(start(self, policy))
        pool = self.pool = pools[0]
        # numbers of weights go on: a worker loads those whose number it has not seen
        self.store._serial = pool.store._serial
        pool.store, pool.events, pool.cluster, pool.rollouts = self.store, self.events, self.cluster, RolloutIndex()
        self.store.put(policy)
        return pool

    monkeypatch.setattr(RayBackend, "open_pool", open_pool)
    monkeypatch.setattr(WorkerPool, "stop", lambda self: None)


@pytest.fixture
def whole(two_nodes: Any, pools: list[WorkerPool]) -> Any:
    """The cluster with no worker of another run, for tests in which workers end."""
    while pools:
        pools.pop().stop()
    return two_nodes
