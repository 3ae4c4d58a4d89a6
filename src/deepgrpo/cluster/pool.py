"""The worker pool: rollout workers as one engine.

    sample ─► assign_requests ─► a call to each worker ─► completions, in the order of the requests
                   ▲                     │ a worker dies or misses the deadline
                   └── its requests ◄────┘ it is replaced; the same keys draw the same tokens
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from deepgrpo.cluster.actors import RolloutWorker
from deepgrpo.cluster.calls import Calls
from deepgrpo.cluster.events import Events
from deepgrpo.cluster.failures import raise_actor_error, raise_task_error
from deepgrpo.cluster.ready import Ready
from deepgrpo.cluster.routing import RequestShare, RolloutIndex, assign_requests
from deepgrpo.cluster.session import Resources, nodes, ray_options
from deepgrpo.cluster.weight_store import WeightStore
from deepgrpo.config import Config
from deepgrpo.engines.base import SampleStats, SamplingParams
from deepgrpo.errors import EngineError, EngineLostError, first_line
from deepgrpo.progress import phase
from deepgrpo.records import Completion, SampleRequest
from deepgrpo.train.build import SamplerBuilder, build_sampler


@dataclass(frozen=True, slots=True)
class Worker:
    """A rollout worker that is ready."""

    actor: Any
    ready: Ready


class WorkerPool:
    """All rollout workers of a cluster (`engines.base.Engine`)."""

    def __init__(
        self, config: Config, resources: Resources, store: WeightStore, events: Events, *,
        sampler: SamplerBuilder = build_sampler,
    ) -> None:  # fmt: skip
        assert config.cluster is not None
        self.config, self.cluster, self.resources, self.store, self.events = config, config.cluster, resources, store, events
        self.sampler = sampler
        self.rollouts = RolloutIndex()
        self.learner_nodes: list[str] = []
        """Node of each learner: a worker must not be started in its place."""
        self.reward_nodes: list[str] = []
        """Node of each reward worker."""
        self.workers: dict[int, Worker] = {}
        self._next_number = 0
        self._nodes = set(nodes())
        self._start_failure = ""
        """Reason why the last worker could not be started."""
        started = self._start(self.cluster.rollout_workers)
        if len(started) < self.cluster.rollout_workers:
            raise EngineError(
                f"only {len(started)} of cluster.rollout_workers = {self.cluster.rollout_workers} could be started: "
                f"{self._start_failure}; look at `ray status` and into Ray's logs"
            )
        self.workers.update(started)
        ready = [worker.ready for worker in self.workers.values()]
        self.exact = all(each.exact for each in ready)
        self.remark = ready[0].remark
        self.threads = ready[0].threads

    def forget(self) -> None:
        """See `engines.base.Engine.forget`."""
        self.rollouts.forget()
        for worker in self.workers.values():
            worker.actor.forget.remote()

    def close(self) -> None:
        """See `engines.base.Engine.close`. Workers outlive a run that resumes, so the backend ends them by `stop`."""

    # ------------------------------------------------------------ sampling

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        """See `engines.base.Engine.sample`."""
        began = time.perf_counter()
        results: list[list[Completion | None]] = [[None] * len(request.keys) for request in requests]
        cost = SampleStats()
        calls: Calls[tuple[int, list[RequestShare]]] = Calls("cluster.sample_deadline_s", self.cluster.sample_deadline_s)

        def send(assigned: dict[int, list[RequestShare]]) -> None:
            for number, shares in assigned.items():
                cut = [_part_of(requests[share.request], share) for share in shares]
                weights, serial = self.store.current
                calls.add(self.workers[number].actor.sample.remote(weights, serial, cut, params, keep), (number, shares))

        send(assign_requests(requests, list(self.workers), self.rollouts))
        with phase("sampling", sum(len(request.keys) for request in requests)) as advance:
            for (number, shares), answer in calls:
                if isinstance(answer, Exception):
                    self._replace(number, _engine_lost(answer) or calls.reason(answer, self.events))
                    self.events.counts["resampled_requests"] += len(shares)
                    send(_reassign(shares, requests, list(self.workers), self.rollouts))
                    continue
                groups, spent = answer
                cost += spent
                for share, group in zip(shares, groups, strict=True):
                    for index, completion in zip(share.indices, group, strict=True):
                        results[share.request][index] = completion
                    if keep:
                        self.rollouts.add(requests[share.request].prefix, group, number)
                    advance(len(group))
        done = [[c for c in group if c is not None] for group in results]
        assert all(len(group) == len(request.keys) for group, request in zip(done, requests, strict=True))
        return done, replace(cost, seconds=time.perf_counter() - began)

    # ------------------------------------------------------------ workers

    def refresh(self) -> None:
        """Between steps: report nodes that joined or left, drop workers on lost nodes, start missing workers."""
        alive = set(nodes())
        for node in self._nodes - alive:
            self.events.report("node_left", f"node {node[:8]} has left")
        for node in alive - self._nodes:
            self.events.report("node_joined", f"node {node[:8]} has joined")
        self._nodes = alive
        for number in [n for n, worker in self.workers.items() if worker.ready.node not in alive]:
            self._drop(number)
            self.events.report_loss("worker_lost", f"rollout worker {number} was on a node that has left")
        missing = self.cluster.rollout_workers - len(self.workers)
        if missing and self.resources.has_room(self._used()):
            self.workers.update(self._start_one_by_one(missing))
        if not self.workers:
            raise EngineError(
                "no rollout worker is left, and the cluster has no room for one; add a machine and continue with --resume"
            )

    def stop(self) -> None:
        """End all workers."""
        for number in list(self.workers):
            self._drop(number)

    def _replace(self, number: int, reason: str) -> None:
        """Drop a worker, and start another in its place if there is room."""
        known = number in self.workers
        self._drop(number)
        if known:
            self.events.report_loss("worker_lost", f"rollout worker {number} {reason}; its requests are sampled again")
            self.workers.update(self._start_one_by_one(1))
        if not self.workers:
            raise EngineError(
                f"rollout worker {number} {reason}, it was the last one, and the cluster has no room for another; add a "
                "machine and continue with --resume"
            )

    def _drop(self, number: int) -> None:
        self.rollouts.forget(number)
        worker = self.workers.pop(number, None)
        if worker is not None:
            ray.kill(worker.actor)

    def _used(self) -> list[tuple[str, dict[str, float]]]:
        """Node and resources of each running process."""
        return [
            *((worker.ready.node, self.resources.worker) for worker in self.workers.values()),
            *((node, self.resources.learner) for node in self.learner_nodes),
            *((node, self.resources.reward_worker) for node in self.reward_nodes),
        ]

    def _start_one_by_one(self, count: int) -> dict[int, Worker]:
        """Start at most `count` workers, as many as there is room for, and report each."""
        started: dict[int, Worker] = {}
        for _ in range(count):
            used = self._used() + [(worker.ready.node, self.resources.worker) for worker in started.values()]
            if not self.resources.has_room(used):
                break
            new = self._start(1)
            if not new:
                break
            started |= new
        for number, worker in started.items():
            self.events.report("worker_started", f"rollout worker {number} has started on node {worker.ready.node[:8]}")
        return started

    def _start(self, count: int) -> dict[int, Worker]:
        """Start `count` workers; return those that are ready in time."""
        # a worker on every node before a second one on any
        options = {**ray_options(self.resources.worker), "scheduling_strategy": "SPREAD"}
        make = ray.remote(RolloutWorker).options(**options)
        device = self.resources.device
        actors = {self._next_number + i: make.remote(self.config, device, self.sampler) for i in range(count)}
        self._next_number += count
        answers = {number: actor.ready.remote() for number, actor in actors.items()}
        ray.wait(list(answers.values()), num_returns=count, timeout=self.cluster.start_deadline_s)
        started: dict[int, Worker] = {}
        for number, answer in answers.items():
            try:
                started[number] = Worker(actors[number], ray.get(answer, timeout=0))
            except (RayError, TimeoutError) as error:
                ray.kill(actors[number])
                raise_actor_error(error)
                late = isinstance(error, TimeoutError)
                self._start_failure = (
                    f"one had not loaded the model after cluster.start_deadline_s = {self.cluster.start_deadline_s:g} seconds"
                    if late
                    else f"one died before it had loaded the model ({first_line(error)})"
                )
        return started


def _engine_lost(error: Exception) -> str | None:
    """Describe the loss of a worker's engine; None if the worker itself is lost. Raises any other error of the worker."""
    if not isinstance(error, RayTaskError):
        return None
    if isinstance(error.cause, EngineLostError):
        return f"has lost its engine ({first_line(error.cause)})"
    raise_task_error(error)


def _part_of(request: SampleRequest, share: RequestShare) -> SampleRequest:
    return replace(request, keys=tuple(request.keys[index] for index in share.indices))


def _reassign(
    shares: Sequence[RequestShare], requests: Sequence[SampleRequest], workers: Sequence[int], rollouts: RolloutIndex
) -> dict[int, list[RequestShare]]:
    """Assign the shares of a lost worker to the others."""
    if not shares:
        return {}
    parts = assign_requests([_part_of(requests[share.request], share) for share in shares], workers, rollouts)

    def original(part: RequestShare) -> RequestShare:
        whole = shares[part.request]
        return RequestShare(whole.request, tuple(whole.indices[index] for index in part.indices))

    return {number: [original(part) for part in own] for number, own in parts.items()}
