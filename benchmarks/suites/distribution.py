"""Cost of a cluster of 1, 2 and 4 rollout workers: real Ray, workers, routing and weights, with a simulated engine.

`rounds.py` takes a `sample()` call apart. 0 workers are the same engine in this process, without Ray.

All arms use the same four workers; those beyond an arm's number idle, so that arms can run in turn.
"""

from __future__ import annotations

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
from benchmarks.simulated import Simulation
from benchmarks.suites.rounds import Watched, added
from benchmarks.workloads import branch_requests, build_trees, main_requests
from deepgrpo import rng
from deepgrpo.cluster.run import RayBackend
from deepgrpo.cluster.session import require_ray, session
from deepgrpo.config import Config, parse_config
from deepgrpo.engines.base import SamplingParams
from deepgrpo.errors import MissingExtraError
from deepgrpo.model.policy import Policy
from deepgrpo.prompts import synthetic
from deepgrpo.records import SampleRequest
from deepgrpo.runs.checkpoints import TrainState
from deepgrpo.train.backend import LocalBackend
from deepgrpo.train.build import build_policy
from deepgrpo.train.loop import train_step
from deepgrpo.train.setup import Run, open_run

if TYPE_CHECKING:
    from deepgrpo.cluster.pool import WorkerPool

LATENCY_S, ROWS = 0.002, 16
"""Simulated engine: seconds for a token of all rows, and number of rows."""
WORKERS = (0, 1, 2, 4)
MODELS: dict[str, dict[str, int]] = {
    "0.5M": {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "intermediate_size": 480},
    "135M": {"hidden_size": 768, "num_layers": 14, "num_heads": 12, "intermediate_size": 3160},
}
"""Policies whose weights are sent; only the first is trained."""
CALLS = 10
"""Calls of one token in a run of a `call` arm."""

Shape = Literal["equal", "spread"]
STOPS: dict[Shape, tuple[str, ...]] = {"equal": (), "spread": (" ",)}


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


# ---------------------------------------------------------------- arms


@dataclass
class _Told:
    """Figures of an arm beyond its seconds, run by run."""

    what: str
    workers: int
    runs: list[dict[str, float]] = field(default_factory=list)


class _Arms:
    def __init__(self, setting: BenchSetting) -> None:
        self.setting, self.workload = setting, setting.workload
        self.trees = build_trees(setting.workload)
        self.told: dict[str, _Told] = {}
        self.drawn: dict[str, list[Any]] = {}
        """Samples of the first arm of a kind; all others must draw the same."""
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
            told.runs.append(added(watched.rounds))
            for name, each in zip(("rollouts", "branches"), watched.rounds, strict=False):
                told.runs[-1] |= {f"{name}/{key}": value for key, value in added([each]).items()}
            return Timed(stats.sampled_tokens, sum(each.seconds for each in watched.rounds))

        return self._arm(f"{shape}_{workers}", run, f"rollouts and branches, lengths {shape}, {_count(workers)}")

    def step(self, workers: int) -> Arm:
        """`train_step` on the same state each time: the same trees in every run of every arm."""
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
            told.runs.append({**added(watched.rounds), **figures, "other": other, "seconds": seconds})
            self._same("step", [metrics["sampled_tokens"], metrics.get("pivots/count")])
            return Timed(int(metrics["sampled_tokens"]), seconds)

        learner = " and a learner" if workers else ""
        return self._arm(f"step_{workers}", run, f"a whole DEEP-GRPO step, lengths spread, {_count(workers)}{learner}")

    def call(self, workers: int) -> Arm:
        """One token by each worker: the cost of a call that carries next to nothing."""
        watched, told = self._engine(workers), self._tell(f"call_{workers}", "call", workers)

        def run() -> Timed:
            watched.rounds.clear()
            with self._as_if(watched.pool, workers):
                for _ in range(CALLS):
                    watched.sample(_ping(workers), SamplingParams())
            told.runs += [added([each]) for each in watched.rounds]
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
            told.runs.append({**added(watched.rounds), "put": put, "seconds": seconds, "weights_bytes": float(carried)})
            return Timed(workers, seconds)

        return self._arm(f"weights_{size}_{workers}", run, f"{carried / 1e6:,.1f} MB to {_count(workers)}, one token each")

    def extra(self) -> dict[str, Any]:
        """Medians and ranges of all parts, without the warm-up."""
        found: dict[str, Any] = {}
        for name, told in self.told.items():
            skipped = self.setting.warmup * (CALLS if told.what == "call" else 1)
            runs = told.runs[skipped:]
            keys = sorted({key for run in runs for key in run})
            found[name] = {"workers": told.workers, "parts": {key: _range([run[key] for run in runs]) for key in keys}}
        return {"engine": {"latency_s": LATENCY_S, "rows": ROWS, "ends": self.simulation.ends}, "distribution": found}

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
            return Watched(self.simulation(self._recipe(first, None), self._policy(first)), self.simulation, None)
        pool = self._backend(first).pool
        assert pool is not None
        return Watched(pool, self.simulation, pool)

    def _policy(self, size: str) -> Policy:
        """The policy of this size, shared by all arms as none trains it."""
        if size not in self._policies:
            self._policies[size] = build_policy(self._recipe(size, None), "cpu")
        return self._policies[size]

    @cached_property
    def _session(self) -> str:
        """Start Ray with room for the workers of all models and a learner. Returns its version."""
        config = self._recipe(next(iter(MODELS)), len(MODELS) * max(WORKERS))
        assert config.cluster is not None
        try:
            self.setting.closing.enter_context(session(config.cluster))
        except MissingExtraError as error:
            raise LeftOutError(str(error)) from None
        return str(require_ray().__version__)

    def _backend(self, size: str) -> RayBackend:
        """The backend whose workers have a model of this size; the first call starts them."""
        if size not in self._backends:
            _ = self._session
            backend = RayBackend(self._recipe(size, max(WORKERS)), sampler=self.simulation)
            self.setting.closing.callback(backend.close)
            backend.open_pool(self._policy(size))
            self._backends[size] = backend
        return self._backends[size]

    @contextmanager
    def _as_if(self, pool: WorkerPool | None, workers: int) -> Iterator[None]:
        """Limit the pool to this many workers; the others idle."""
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
        """A run that writes nothing, and its state before the first step. All arms on the cluster share one."""
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
        """Recipe of DEEP-GRPO in the shape of the workload, with random rewards and a tiny learning rate."""
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
    return {0: "in this process", 1: "1 worker"}.get(workers, f"{workers} workers")


def _ping(workers: int) -> list[SampleRequest]:
    return [SampleRequest((1,), (rng.key("ping", i),), 1) for i in range(workers)]


def _range(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest value, rounded to the microsecond."""
    return {"median": round(statistics.median(values), 6), "min": round(min(values), 6), "max": round(max(values), 6)}
