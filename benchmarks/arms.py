"""The words of the benchmarks: an arm is one way of doing the work, a suite is what is compared in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.workloads import Workload


class Timed(NamedTuple):
    """What one run of an arm did."""

    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of doing the work, ready to run.

    Example: Arm("tree", update, "packs of unique tokens"), where `update()` returns how many tokens it computed.
    """

    name: str
    run: Callable[[], int | Timed]
    """Returns the tokens it computed; with seconds, if not all of the call is to be counted."""
    note: str = ""
    peak_mb: Callable[[], float | None] | None = None
    """The highest memory so far, of an arm that runs in a process of its own."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the library that it runs."""

    def timed(self) -> Timed:
        began = time.perf_counter()
        done = self.run()
        return done if isinstance(done, Timed) else Timed(done, time.perf_counter() - began)


class LeftOutError(Exception):
    """An arm cannot be had here; the message says why, and what would help."""


class Offer(NamedTuple):
    """An arm that can be chosen. `make` may take a while and much memory, so only chosen arms are made."""

    name: str
    make: Callable[[], Arm]
    """Raises LeftOutError."""
    default: bool = True
    """Whether it runs without being asked for."""


@dataclass(frozen=True, slots=True)
class BenchSetting:
    """What the arms of a run have in common."""

    workload: Workload
    budget: int
    """Token budget of a forward pass of the learner."""
    threads: int
    closing: ExitStack
    """Ends with the run: processes and directories of the arms."""
    vllm_python: Path | None = None
    warmup: int = 0
    """Rounds through all arms that do not count, for arms that keep figures of their own."""


@dataclass(frozen=True, slots=True)
class Suite:
    """The arms of one part of a step."""

    baseline: str
    offers: Sequence[Offer]
    pairs: Sequence[tuple[str, str]] = ()
    """Arms (ours, other) that do the same work in the same arithmetic, whose ratio is reported besides."""
    extra: Callable[[], dict[str, Any]] = dict
    """More for the report."""
    apart: frozenset[str] = frozenset()
    """Arms that do other work than the baseline, so that a ratio would say nothing."""
