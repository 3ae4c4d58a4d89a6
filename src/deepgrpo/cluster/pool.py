"""Rollout workers as one engine.

    sample ─► routing.spread ─► a call to each worker ─► completions, back in order
                   ▲                     │ a worker dies, or does not answer in time
                   └── its requests ◄────┘ it is replaced; the same keys draw the same tokens
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import ray
from ray.exceptions import RayError, RayTaskError

from deepgrpo.cluster.actors import BuildEngine, Hello, RolloutWorker
from deepgrpo.cluster.calls import Calls
from deepgrpo.cluster.events import Events
from deepgrpo.cluster.routing import RequestShare, RolloutIndex, spread
from deepgrpo.cluster.session import Needs, nodes, ray_options
from deepgrpo.cluster.weight_store import WeightStore
from deepgrpo.config import Config
from deepgrpo.engines.base import SampleStats, SamplingParams
from deepgrpo.errors import DeepGRPOError, EngineError, EngineLostError
from deepgrpo.records import Completion, SampleRequest
from deepgrpo.train.engine import build_engine


@dataclass(frozen=True, slots=True)
class Worker:
    """A rollout worker that has said hello."""

    actor: Any
    hello: Hello


class WorkerPool:
    """See `engines.base.Engine`. Several threads may sample at once (`explore/waves.py`)."""

    def __init__(
        self, config: Config, needs: Needs, shelf: WeightStore, events: Events, *, build: BuildEngine = build_engine
    ) -> None:
        assert config.cluster is not None
        self.build = build
        self.config, self.cluster, self.needs, self.shelf, self.events = config, config.cluster, needs, shelf, events
        self.kept = RolloutIndex()
        self._lock = threading.Lock()
        """For who is there and who has what."""
        self.learner_nodes: list[str] = []
        """Where the learners are, so that nothing is started in their place; and so with the reward workers."""
        self.reward_nodes: list[str] = []
        self.workers: dict[int, Worker] = {}
        self._next = 0
        self._nodes = set(nodes())
        self._trouble = ""
        """Why a worker that was to be started last is not there."""
        started = self._start(self.cluster.rollout_workers)
        if len(started) < self.cluster.rollout_workers:
            raise EngineError(
                f"only {len(started)} of cluster.rollout_workers = {self.cluster.rollout_workers} could be started: "
                f"{self._trouble}; look at `ray status` and into Ray's logs"
            )
        self.workers.update(started)
        hellos = [worker.hello for worker in self.workers.values()]
        self.exact = all(hello.exact for hello in hellos)
        self._remark = hellos[0].remark

    @property
    def remark(self) -> str | None:
        """See `engines.base.Engine.remark`."""
        return self._remark

    def forget(self) -> None:
        """See `engines.base.Engine.forget`."""
        self.kept.forget()
        for worker in self.workers.values():
            worker.actor.forget.remote()

    def close(self) -> None:
        """See `engines.base.Engine.close`: the workers belong to the place, and outlive a run that comes back."""

    # ------------------------------------------------------------ sampling

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        """See `engines.base.Engine.sample`."""
        began = time.perf_counter()
        results: list[list[Completion | None]] = [[None] * len(request.keys) for request in requests]
        cost = SampleStats()
        calls: Calls[tuple[int, list[RequestShare]]] = Calls("cluster.sample_deadline_s", self.cluster.sample_deadline_s)

        def send(wanted: Sequence[RequestShare] | None = None) -> None:
            workers = list(self.workers)
            shares = spread(requests, workers, self.kept) if wanted is None else _moved(wanted, requests, workers, self.kept)
            for number, parts in shares.items():
                asked = [_cut(requests[part.request], part) for part in parts]
                weights, serial = self.shelf.current
                calls.add(self.workers[number].actor.sample.remote(weights, serial, asked, params, keep), (number, parts))

        with self._lock:
            send()
        for (number, parts), answer in calls:
            if isinstance(answer, Exception):
                why = _engine_lost(answer) or calls.why(answer, self.events)
                with self._lock:
                    self._lose(number, why)
                    self.events.counts["resampled_requests"] += len(parts)
                    send(parts)
                continue
            groups, spent = answer
            cost += spent
            for part, group in zip(parts, groups, strict=True):
                for place, completion in zip(part.places, group, strict=True):
                    results[part.request][place] = completion
            if keep:
                with self._lock:
                    for part, group in zip(parts, groups, strict=True):
                        self.kept.put(requests[part.request].prefix, group, number)
        done = [[c for c in group if c is not None] for group in results]
        assert all(len(group) == len(request.keys) for group, request in zip(done, requests, strict=True))
        return done, SampleStats(
            cost.sampled_tokens, cost.prefix_tokens, cost.prefix_tokens_encoded, time.perf_counter() - began
        )

    # ------------------------------------------------------------ coming and going

    def tend(self) -> None:
        """Between steps: note which nodes came and went, drop workers that are gone, start those that are missing."""
        alive = set(nodes())
        for node in self._nodes - alive:
            self.events.tell("node_left", f"node {node[:8]} has left")
        for node in alive - self._nodes:
            self.events.tell("node_joined", f"node {node[:8]} has joined")
        self._nodes = alive
        for number in [n for n, worker in self.workers.items() if worker.hello.node not in alive]:
            self._drop(number)
            self.events.lost("worker_lost", f"rollout worker {number} was on a node that has left")
        missing = self.cluster.rollout_workers - len(self.workers)
        if missing and self.needs.room(self._used()):
            self.workers.update(self._start_one_by_one(missing))
        if not self.workers:
            raise EngineError(
                "no rollout worker is left, and the cluster has no room for one; add a machine and continue with --resume"
            )

    def _lose(self, number: int, why: str) -> None:
        """A worker is gone or stuck, or what it samples with is: put another in its place if there is room."""
        known = number in self.workers
        self._drop(number)
        if known:
            self.events.lost("worker_lost", f"rollout worker {number} {why}; its requests are sampled again")
            self.workers.update(self._start_one_by_one(1))
        if not self.workers:
            raise EngineError(
                f"rollout worker {number} {why}, it was the last one, and the cluster has no room for another; add a machine "
                "and continue with --resume"
            )

    def _drop(self, number: int) -> None:
        self.kept.forget(number)
        worker = self.workers.pop(number, None)
        if worker is not None:
            ray.kill(worker.actor)

    def _used(self) -> list[tuple[str, dict[str, float]]]:
        return [
            *((worker.hello.node, self.needs.worker) for worker in self.workers.values()),
            *((node, self.needs.learner) for node in self.learner_nodes),
            *((node, self.needs.reward_worker) for node in self.reward_nodes),
        ]

    def _start_one_by_one(self, count: int) -> dict[int, Worker]:
        """As many as there is room for, at most `count`; each with its line in the log."""
        started: dict[int, Worker] = {}
        for _ in range(count):
            used = self._used() + [(worker.hello.node, self.needs.worker) for worker in started.values()]
            if not self.needs.room(used):
                break
            new = self._start(1)
            if not new:
                break
            started |= new
        for number, worker in started.items():
            self.events.tell("worker_started", f"rollout worker {number} has started on node {worker.hello.node[:8]}")
        return started

    def _start(self, count: int) -> dict[int, Worker]:
        """Those of `count` new workers that say hello in time."""
        # a worker on every node before a second one on any
        options = {**ray_options(self.needs.worker), "scheduling_strategy": "SPREAD"}
        make = ray.remote(RolloutWorker).options(**options)
        actors = {self._next + i: make.remote(self.config, self.needs.device, self.build) for i in range(count)}
        self._next += count
        answers = {number: actor.hello.remote() for number, actor in actors.items()}
        ray.wait(list(answers.values()), num_returns=count, timeout=self.cluster.start_deadline_s)
        started: dict[int, Worker] = {}
        for number, answer in answers.items():
            try:
                started[number] = Worker(actors[number], ray.get(answer, timeout=0))
            except (RayError, TimeoutError) as error:
                ray.kill(actors[number])
                raise_ours(error)
                late = isinstance(error, TimeoutError)
                self._trouble = (
                    f"one had not loaded the model after cluster.start_deadline_s = {self.cluster.start_deadline_s:g} seconds"
                    if late
                    else f"one died before it had loaded the model ({str(error).strip().splitlines()[0]})"
                )
        return started

    def end(self) -> None:
        """End the workers."""
        for number in list(self.workers):
            self._drop(number)


def _engine_lost(error: Exception) -> str | None:
    """What is to be said of a worker that has lost what it samples with; None if it is the worker that is gone.

    Raises what else went wrong inside it.
    """
    if not isinstance(error, RayTaskError):
        return None
    if isinstance(error.cause, EngineLostError):
        return f"has lost its engine ({str(error.cause).splitlines()[0]})"
    raise_inside(error)


def raise_inside(error: RayTaskError) -> NoReturn:
    """Raise what a call raised in another process: the error of our own, or Ray's with the traceback."""
    raise error.cause if isinstance(error.cause, DeepGRPOError) else error from None


def raise_ours(error: Exception) -> None:
    """Raise the error of our own, if that is what ended an actor: a model that cannot be loaded stays so."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, DeepGRPOError):
        raise cause from None
    # of an actor that failed in its constructor Ray tells by text only
    if "because of an error raised in its creation task" in str(error):
        raise EngineError(f"a process of the cluster could not be built: {str(error).strip().splitlines()[-1]}") from None


def _cut(request: SampleRequest, part: RequestShare) -> SampleRequest:
    return replace(request, keys=tuple(request.keys[place] for place in part.places))


def _moved(
    parts: Sequence[RequestShare], requests: Sequence[SampleRequest], workers: Sequence[int], kept: RolloutIndex
) -> dict[int, list[RequestShare]]:
    """The parts of a worker that is gone, shared out anew."""
    shares = spread([_cut(requests[part.request], part) for part in parts], workers, kept) if parts else {}

    def named(part: RequestShare) -> RequestShare:
        whole = parts[part.request]
        return RequestShare(whole.request, tuple(whole.places[place] for place in part.places))

    return {number: [named(part) for part in share] for number, share in shares.items()}
