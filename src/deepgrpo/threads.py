"""CPU threads: how long idle ones spin, which is read when torch loads, and how many suit a model. No torch

Threads of OpenMP wait for each other at the end of every operation, and spin meanwhile. On a core that another process also
wants, they spin for whole time slices while the thread they wait for is not running: a run beside one busy process takes
several times as long (docs/results/busy.md). A short spin costs nothing on a quiet machine.

The number of threads changes how sums are rounded, so it follows from the size of the model and never from a measurement, and a
run keeps its number (`run.threads` in its config.toml).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

SPIN = {
    "GOMP_SPINCOUNT": "1000",  # libgomp, which torch's Linux wheels bring along: turns of its waiting loop, 300,000 by default
    "KMP_BLOCKTIME": "1",  # libomp (torch on macOS) and libiomp5 (conda, vLLM): milliseconds, 200 by default
}
SPIN_OF_USERS = ("OMP_WAIT_POLICY", *SPIN)
"""Variables by which users set it themselves; any of them leaves all to the user."""

NUMBER_OF_USERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that torch takes its number of threads from."""

CPUS = "DEEPGRPO_CPUS"
"""Environment variable: CPUs that a process may count on, for jobs that share a machine."""

PARAMETERS_PER_THREAD = 100_000
"""Parameters of a model for each thread. With fewer, a thread more costs as much as it brings."""


def spin_settings(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables to set before torch loads; none if the user has set one of them."""
    return {} if any(name in environ for name in SPIN_OF_USERS) else dict(SPIN)


def limit_spinning(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set those variables, also for all child processes."""
    environ.update(spin_settings(environ))


@dataclass(frozen=True, slots=True)
class Threads:
    """A number of threads. Example: Threads(1, 2, "model of 0.03M parameters")."""

    number: int
    cpus: int
    """CPUs that this process may use."""
    why: str = ""
    """Reason for a number other than that of the CPUs."""

    def __str__(self) -> str:
        reason = f" ({self.why})" if self.why and self.number != self.cpus else ""
        return f"{_count(self.cpus, 'core')}, {_count(self.number, 'thread')}{reason}"


def threads_for(parameters: int, cpus: int) -> int:
    """Return the number of threads for a model: one per 100,000 parameters, at least one, at most one per CPU.

    >>> threads_for(30_000, 8), threads_for(220_000, 8), threads_for(135_000_000, 8)
    (1, 2, 8)
    """
    return max(1, min(cpus, parameters // PARAMETERS_PER_THREAD))


def available_cpus() -> int:
    """Return how many CPUs this process may use: by affinity, by the quota of its container, by DEEPGRPO_CPUS. At least 1."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = cgroup_cpus()
    if quota is not None:
        count = min(count, int(quota))
    given = os.environ.get(CPUS, "")
    if given.isdecimal():
        count = min(count, int(given))
    return max(1, count)


def cgroup_cpus(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the CPUs that the control group of this process has time for: the lowest quota on its path; None without one.

    Args:
        root: where control groups are mounted.
        own: file that names the groups of this process, `NUMBER:CONTROLLERS:PATH` per line.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        # a container may see the path of the host, with only its own group mounted: then the root is its group
        for mounted in [root] if not controllers else [root / "cpu", root / controllers]:
            place = mounted / path.lstrip("/")
            for group in (place, *place.parents):
                quotas.append(_quota_v1(group) if controllers else _quota_v2(group))
                if group == mounted:
                    break
    return min((each for each in quotas if each is not None), default=None)


def _quota_v2(group: Path) -> float | None:
    """Quota of a group of version 2: cpu.max is `QUOTA PERIOD`, QUOTA "max" for none."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(group: Path) -> float | None:
    """Quota of a group of version 1; -1 for none."""
    try:
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
