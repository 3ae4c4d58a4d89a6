"""What a cluster of 1, 2 and 4 rollout workers costs: real Ray, workers, routing and weights, a simulated engine.

    seconds of a `sample()` call = ideal     tokens × latency / (workers × rows): no row ever waits
                                 + tail      what one engine with all the rows would take above that: its last rows end alone
                                 + routing   the share of the last worker above that
                                 + engine    the last worker's sleep above what was asked of it
                                 + weights   taken over by the last worker, where they are new
                                 + spread    deciding who samples what        (timed beside, on the same requests)
                                 + pickle    requests there, completions back (timed beside, on the same objects)
                                 + ray       all other time between the caller and the last worker, there and back

The first three follow from the lengths and the shares alone; where all lengths are equal the tail is rounding to whole waves.
Routing may be below zero, as the shares are in another order than the requests. The parts of a call add up to its seconds.
What is lost to distribution is all but the first two. 0 workers are the same engine in this process, without Ray.

All arms use the same four workers, of which those beyond an arm's number sit idle, so arms can be run in turn.
"""

from __future__ import annotations

import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.arms import Arm, BenchSetting, LeftOutError, Offer, Suite, Timed
from benchmarks.simulated import Note, Simulation, schedule, take_notes
from benchmarks.workloads import branch_requests, build_trees, main_requests
from deepgrpo import rng
from deepgrpo.cluster.routing import assign_requests
from deepgrpo.cluster.run import RayBackend
from deepgrpo.cluster.session import require_ray, session
from deepgrpo.config import Config, parse_config
from deepgrpo.engines.base import Engine, SampleStats, SamplingParams
from deepgrpo.errors import MissingExtraError
from deepgrpo.model.policy import Policy
from deepgrpo.prompts import synthetic
from deepgrpo.records import Completion, SampleRequest
from deepgrpo.runs.checkpoints import TrainState
from deepgrpo.train.backend import LocalBackend
from deepgrpo.train.build import build_policy
from deepgrpo.train.loop import train_step
from deepgrpo.train.setup import Run, open_run

if TYPE_CHECKING:
    from deepgrpo.cluster.pool import WorkerPool

LATENCY_S, ROWS = 0.002, 16
"""Of the simulated engine: seconds for a token of all rows, and how many rows."""
WORKERS = (0, 1, 2, 4)
MODELS: dict[str, dict[str, int]] = {
    "0.5M": {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "intermediate_size": 480},
    "135M": {"hidden_size": 768, "num_layers": 14, "num_heads": 12, "intermediate_size": 3160},
}
"""Shapes of the policies whose weights are sent; only the first is trained."""
CALLS = 10
"""Calls of one token in a run of such an arm."""

Shape = Literal["equal", "spread"]
STOPS: dict[Shape, tuple[str, ...]] = {"equal": (), "spread": (" ",)}
PARTS = ("ideal", "tail", "routing", "engine", "weights", "spread", "pickle", "ray")


def distribution_suite(setting: BenchSetting) -> Suite:
    arms = _Arms(setting)
    shapes: tuple[Shape, ...] = ("equal", "spread")
    offers = [Offer(f"{shape}_{n}", partial(arms.sampling, shape, n)) for shape in shapes for n in WORKERS]
    offers += [Offer(f"step_{n}", partial(arms.step, n)) for n in WORKERS]
    offers += [Offer(f"call_{n}", partial(arms.call, n)) for n in WORKERS if n]
    offers += [Offer(f"weights_{size}_{n}", partial(arms.weights, size, n)) for size in MODELS for n in WORKERS if n]
    pairs = [(f"{what}_{n}", f"{what}_1") for what in (*shapes, "step") for n in WORKERS if n > 1]
    apart = frozenset(offer.name for offer in offers if not offer.name.startswith("equal"))
    return Suite(baseline="equal_0", offers=offers, pairs=pairs, extra=arms.extra, apart=apart)


# ---------------------------------------------------------------- one call of sample()


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of one call by part (`PARTS`); they add up to `seconds`. Example: the rollouts of a step."""

    seconds: float
    parts: dict[str, float]
    sent_bytes: int
    """Requests and completions, pickled."""


class Watched:
    """An engine whose calls are taken apart (`engines.base.Engine`)."""

    exact, remark = False, None

    def __init__(self, engine: Engine, simulation: Simulation, pool: WorkerPool | None) -> None:
        self.engine, self.simulation, self.pool = engine, simulation, pool
        self.rounds: list[Round] = []
        self.beside_s = 0.0
        """Spent on taking apart, so that a caller can leave it out."""

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        """See `engines.base.Engine.sample`."""
        before = time.monotonic()
        workers = list(self.pool.workers) if self.pool else []
        if self.pool:
            assign_requests(requests, workers, self.pool.rollouts)  # as the pool is about to do
        began = time.monotonic()
        done, stats = self.engine.sample(requests, params, keep=keep)
        ended = time.monotonic()
        notes = take_notes(Path(self.simulation.notes))
        lengths = self.simulation.lengths(requests, params)
        self.rounds.append(self._round(requests, done, lengths, notes, began, ended, began - before))
        self.beside_s += began - before + time.monotonic() - ended
        return done, stats

    def _round(
        self, requests: Sequence[SampleRequest], done: Sequence[Sequence[Completion]], lengths: Sequence[int],
        notes: Sequence[Note], began: float, ended: float, spread_s: float,
    ) -> Round:  # fmt: skip
        simulation, count = self.simulation, len(self.pool.workers) if self.pool else 1
        last = max(notes, key=lambda note: note.ended)
        ideal = sum(lengths) * simulation.latency_s / (count * simulation.max_rows)
        one = schedule(lengths, count * simulation.max_rows) * simulation.latency_s
        parts = dict.fromkeys(PARTS, 0.0) | {
            "ideal": ideal, "tail": one - ideal, "routing": last.asked_s - one,
            "engine": last.ended - last.began - last.asked_s,
        }  # fmt: skip
        sent = 0
        if self.pool:
            out_s, in_s, asked_bytes = _pickled(requests)
            back_s, home_s, told_bytes = _pickled(done)
            # the caller packs and unpacks all shares, a worker its own
            wire = out_s + in_s / count + back_s / count + home_s
            there_and_back = last.arrived - began + ended - last.ended
            parts |= {
                "weights": last.began - last.arrived, "spread": spread_s, "pickle": wire,
                "ray": there_and_back - spread_s - wire,
            }  # fmt: skip
            sent = asked_bytes + told_bytes
        else:
            parts["engine"] += last.began - began + ended - last.ended
        return Round(ended - began, parts, sent)

    def forget(self) -> None:
        """See `engines.base.Engine.forget`."""
        self.engine.forget()

    def close(self) -> None:
        """See `engines.base.Engine.close`."""
        self.engine.close()


def _pickled(what: Any) -> tuple[float, float, int]:
    """Seconds to pickle it as Ray does (protocol 5) and back, and its bytes."""
    began = time.monotonic()
    packed = pickle.dumps(what, protocol=5)
    middle = time.monotonic()
    pickle.loads(packed)
    return middle - began, time.monotonic() - middle, len(packed)


# ---------------------------------------------------------------- arms


@dataclass
class _Told:
    """What an arm found beyond its seconds, run by run."""

    what: str
    workers: int
    runs: list[dict[str, float]] = field(default_factory=list)


class _Arms:
    def __init__(self, setting: BenchSetting) -> None:
        self.setting, self.workload = setting, setting.workload
        self.trees = build_trees(setting.workload)
        self.told: dict[str, _Told] = {}
        self.drawn: dict[str, list[Any]] = {}
        """What the first arm of a kind has sampled: all others must sample the same."""
        self._policies: dict[str, Policy] = {}
        self._backends: dict[str, RayBackend] = {}
        self._runs: dict[str, tuple[Run, TrainState]] = {}
        self.notes = Path(setting.closing.enter_context(tempfile.TemporaryDirectory(prefix="deepgrpo-bench-")))
        self.simulation = Simulation(
            str(self.notes), LATENCY_S, ROWS, min(0.5, 3 / setting.workload.response), len(synthetic.tokenizer())
        )

    def sampling(self, shape: Shape, workers: int) -> Arm:
        """Rollouts, then branches from them: the two calls of a DEEP-GRPO step."""
        watched, params = self._engine(workers), SamplingParams(stop=STOPS[shape])
        mains = main_requests(self.workload, self.trees)
        told = self._tell(f"{shape}_{workers}", shape, workers)

        def run() -> Timed:
            watched.rounds.clear()
            with self._as_if(watched.pool, workers):
                groups, stats = watched.sample(mains, params, keep=True)
                branches = branch_requests(self.workload, self.trees, groups)
                if branches:
                    more, cost = watched.sample(branches, params)
                    groups, stats = groups + more, stats + cost
            watched.forget()
            self._same(shape, groups)
            names = ("rollouts", "branches")
            told.runs.append(_added(watched.rounds))
            for name, each in zip(names, watched.rounds, strict=False):
                told.runs[-1] |= {f"{name}/{key}": value for key, value in _added([each]).items()}
            return Timed(stats.sampled_tokens, sum(each.seconds for each in watched.rounds))

        where = _count(workers) if workers else "in this process"
        return self._arm(f"{shape}_{workers}", run, f"rollouts and branches, lengths {shape}, {where}")

    def step(self, workers: int) -> Arm:
        """`train_step` on the same state again and again: the same trees in every run of every arm."""
        run_of, state = self._run(workers)
        watched = run_of.engine
        assert isinstance(watched, Watched)
        told = self._tell(f"step_{workers}", "step", workers)

        def run() -> Timed:
            watched.rounds.clear()
            watched.beside_s = 0.0
            with self._as_if(watched.pool, workers):
                _, report = train_step(run_of, state)
            metrics = {key: value for key, value in report.metrics.items() if isinstance(value, float | int)}
            seconds = metrics["time/step"] - watched.beside_s
            figures = {"sample": sum(each.seconds for each in watched.rounds), "learn": metrics["time/learn"]}
            other = seconds - sum(figures.values())
            # `seconds` is that of the step, the parts are those of its sampling
            told.runs.append({**_added(watched.rounds), **figures, "other": other, "seconds": seconds})
            self._same("step", [metrics["sampled_tokens"], metrics.get("pivots/count")])
            return Timed(int(metrics["sampled_tokens"]), seconds)

        where = f"{_count(workers)} and a learner" if workers else "in this process"
        return self._arm(f"step_{workers}", run, f"a whole DEEP-GRPO step, lengths spread, {where}")

    def call(self, workers: int) -> Arm:
        """One token by each worker: what a call costs that carries next to nothing."""
        watched, told = self._engine(workers), self._tell(f"call_{workers}", "call", workers)

        def run() -> Timed:
            watched.rounds.clear()
            with self._as_if(watched.pool, workers):
                for _ in range(CALLS):
                    watched.sample(_ping(workers), SamplingParams())
            told.runs += [_added([each]) for each in watched.rounds]
            return Timed(workers, statistics.median(each.seconds for each in watched.rounds))

        return self._arm(f"call_{workers}", run, f"a call of one token to each of {_count(workers)}")

    def weights(self, size: str, workers: int) -> Arm:
        """New weights into the object store, then one token by each worker, which takes them over first."""
        backend, policy = self._backend(size), self._policy(size)
        pool = backend.pool
        assert pool is not None
        watched = Watched(pool, self.simulation, pool)
        told = self._tell(f"weights_{size}_{workers}", "weights", workers)
        carried = sum(parameter.numel() * 4 for parameter in policy.trainable().values())

        def run() -> Timed:
            watched.rounds.clear()
            with self._as_if(pool, workers):
                began = time.monotonic()
                backend.store.put(policy)
                put = time.monotonic() - began
                watched.sample(_ping(workers), SamplingParams())
            seconds = put + watched.rounds[0].seconds
            told.runs.append(
                {**_added(watched.rounds), "put": put, "seconds": seconds, "weights_bytes": float(carried)}
            )
            return Timed(workers, seconds)

        note = f"{carried / 1e6:,.1f} MB to {_count(workers)}, one token each"
        return self._arm(f"weights_{size}_{workers}", run, note)

    def extra(self) -> dict[str, Any]:
        """Medians and ranges of all parts, warm-up left out."""
        found: dict[str, Any] = {}
        for name, told in self.told.items():
            skipped = self.setting.warmup * (CALLS if told.what == "call" else 1)
            runs = told.runs[skipped:]
            keys = sorted({key for run in runs for key in run})
            found[name] = {"workers": told.workers, "parts": {key: _range([run[key] for run in runs]) for key in keys}}
        return {
            "engine": {"latency_s": LATENCY_S, "rows": ROWS, "ends": self.simulation.ends}, "distribution": found
        }  # fmt: skip

    # ------------------------------------------------------------ help

    def _arm(self, name: str, run: Callable[[], Timed], note: str) -> Arm:
        versions = {} if name.endswith("_0") else {"ray": self._session}
        return Arm(name, run, note, peak_mb=lambda: None, versions=versions)

    def _tell(self, name: str, what: str, workers: int) -> _Told:
        return self.told.setdefault(name, _Told(what, workers))

    def _same(self, what: str, drawn: list[Any]) -> None:
        assert self.drawn.setdefault(what, drawn) == drawn, f"arms of {what} did not sample the same"

    def _engine(self, workers: int) -> Watched:
        first = next(iter(MODELS))
        if not workers:
            config = self._recipe(first, None)
            return Watched(self.simulation(config, self._policy(first)), self.simulation, None)
        pool = self._backend(first).pool
        assert pool is not None
        return Watched(pool, self.simulation, pool)

    def _policy(self, size: str) -> Policy:
        """One for all arms: nobody trains it."""
        if size not in self._policies:
            self._policies[size] = build_policy(self._recipe(size, None), "cpu")
        return self._policies[size]

    @cached_property
    def _session(self) -> str:
        """Ray, with room for the workers of all models and a learner; its version."""
        try:
            ray = require_ray()
        except MissingExtraError as error:
            raise LeftOutError(str(error)) from None
        config = self._recipe(next(iter(MODELS)), len(MODELS) * max(WORKERS))
        assert config.cluster is not None
        self.setting.closing.enter_context(session(config.cluster))
        return str(ray.__version__)

    def _backend(self, size: str) -> RayBackend:
        """The backend with workers for a model of that size, which are started at the first call."""
        if size not in self._backends:
            _ = self._session
            backend = RayBackend(self._recipe(size, max(WORKERS)), sampler=self.simulation)
            self.setting.closing.callback(backend.close)
            backend.open_pool(self._policy(size))
            self._backends[size] = backend
        return self._backends[size]

    @contextmanager
    def _as_if(self, pool: WorkerPool | None, workers: int) -> Iterator[None]:
        """As if the pool had so many workers; the others sit idle."""
        if pool is None:
            yield
            return
        everyone, cluster = pool.workers, pool.cluster
        pool.workers = dict(list(everyone.items())[:workers])
        pool.cluster = cluster.model_copy(update={"rollout_workers": workers})
        try:
            yield
        finally:
            pool.workers, pool.cluster = everyone, cluster

    def _run(self, workers: int) -> tuple[Run, TrainState]:
        """A run that writes nothing, and its state before the first step. Those on the cluster are one and the same."""
        kind = "cluster" if workers else "here"
        if kind not in self._runs:
            first = next(iter(MODELS))
            backend = self._backend(first) if workers else LocalBackend(self.simulation)
            run = open_run(self._recipe(first, max(WORKERS) if workers else None), None, backend)
            if not workers:
                self.setting.closing.callback(run.close)
            watched = Watched(run.engine, self.simulation, self._backend(first).pool if workers else None)
            run.parts = replace(run.parts, engine=watched)
            self._runs[kind] = run, run.begin()
        return self._runs[kind]

    def _recipe(self, size: str, workers: int | None) -> Config:
        """DEEP-GRPO in the shape of the workload, rewards by the toss of a coin; it hardly moves the weights."""
        workload = self.workload
        cluster = {"rollout_workers": workers, "learners": 1, "start_deadline_s": 3000} if workers else None
        return parse_config(
            {
                "run": {
                    "steps": 1, "prompts_per_step": workload.prompts, "device": "cpu", "threads": self.setting.threads,
                    "dir": str(self.notes),
                },
                "model": {"type": "scratch", "max_position": workload.response + 256, **MODELS[size]},
                "data": {"type": "synthetic"},
                "reward": {"type": "user", "function": "benchmarks.simulated:coin"},
                "sampling": {"max_new_tokens": workload.response, "stop": STOPS["spread"]},
                "explore": {
                    "type": "deep", "num_rollouts": workload.rollouts, "num_pivots": int(workload.branches > 0),
                    "branches_per_pivot": max(2, workload.branches),
                    "segments": {"type": "tokens", "size": max(1, workload.response // 10)},
                },
                "loss": {"beta": 0.0}, "optim": {"lr": 1e-9}, "learner": {"tokens_per_pack": self.setting.budget},
                **({"cluster": cluster} if cluster else {}),
            }
        )  # fmt: skip


def _count(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


def _ping(workers: int) -> list[SampleRequest]:
    return [SampleRequest((1,), (rng.key("ping", i),), 1) for i in range(workers)]


def _added(rounds: Sequence[Round]) -> dict[str, float]:
    """Parts of several calls, added up; what is lost of them; `seconds` and `sent_bytes`."""
    found = {part: sum(each.parts[part] for each in rounds) for part in PARTS}
    return {
        **found, "lost": sum(found.values()) - found["ideal"] - found["tail"],
        "seconds": sum(each.seconds for each in rounds), "sent_bytes": float(sum(each.sent_bytes for each in rounds)),
    }  # fmt: skip


def _range(values: Sequence[float]) -> dict[str, float]:
    """To the microsecond."""
    return {"median": round(statistics.median(values), 6), "min": round(min(values), 6), "max": round(max(values), 6)}
