"""Nouns of the benchmarks: an arm is one way of doing the work; a suite is the arms compared in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.workloads import Workload


class Timed(NamedTuple):
    """Result of one run of an arm."""

    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of doing the work, ready to run.

    Example: Arm("tree", update, "packs of unique tokens"), where `update()` returns how many tokens it computed.
    """

    name: str
    run: Callable[[], int | Timed]
    """Returns the number of computed tokens, with seconds if part of the call does not count."""
    note: str = ""
    peak_mb: Callable[[], float | None] | None = None
    """Peak memory so far, for an arm with a process of its own."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries it runs."""

    def timed(self) -> Timed:
        began = time.perf_counter()
        done = self.run()
        return done if isinstance(done, Timed) else Timed(done, time.perf_counter() - began)


class LeftOutError(Exception):
    """An arm is unavailable here; the message gives the reason and the remedy."""


class Offer(NamedTuple):
    """An arm to choose from. `make` may take time and memory, so only chosen arms are made."""

    name: str
    make: Callable[[], Arm]
    """Raises LeftOutError."""
    default: bool = True
    """Runs unless other arms are named."""


@dataclass(frozen=True, slots=True)
class BenchSetting:
    """Settings shared by all arms of a run."""

    workload: Workload
    budget: int
    """Token budget of a forward pass of the learner."""
    threads: int
    closing: ExitStack
    """Processes and directories of the arms, closed at the end of the run."""
    vllm_python: Path | None = None
    warmup: int = 0
    """Uncounted rounds, for arms that keep figures of their own."""


@dataclass(frozen=True, slots=True)
class Suite:
    """The arms of one part of a step."""

    baseline: str
    offers: Sequence[Offer]
    pairs: Sequence[tuple[str, str]] = ()
    """Pairs (ours, other) of the same work in the same arithmetic, whose ratio is reported as well."""
    extra: Callable[[], dict[str, Any]] = dict
    """Additional entries of the report."""
    apart: frozenset[str] = frozenset()
    """Arms whose work differs from the baseline's, so they get no ratio."""
