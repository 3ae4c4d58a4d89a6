"""Worker processes for checks that may hang, crash or raise: each check has a time limit and costs its own sample only.

    checks (picklable functions) ─► worker (time limit) ─► one Score each

A check that hangs, crashes or raises scores zero with the problem "timeout", "crash" or "raised"; a value that is NaN or
infinite, "not finite". The time limit of a check starts when a worker takes it up: waiting behind others and the imports
of a fresh worker are not counted.

Workers are forked from a small server process that has torch not, so a killed one is replaced in a few milliseconds;
where there is no such server (Windows) they are spawned. As always with `multiprocessing`, a script that trains needs
`if __name__ == "__main__":` around its main part.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from pebble import ProcessExpired, ProcessPool

from deepgrpo.errors import RewardError
from deepgrpo.records import Score

Check = Callable[[], tuple[float, bool]]
"""Gives (value, found): the score, and whether there was an answer in the text. It travels to the worker as a pickle."""

_MEMORY_LIMIT = 4 << 30  # bytes; 9**9**9 would otherwise ask for all there is before its time is up


class Workers:
    """A pool that is started with the first check, and again after a check has broken it."""

    def __init__(
        self, wanted_by: str, prepare: Callable[[], None], preload: str, *, count: int = 1, timeout_s: float = 5.0
    ) -> None:
        """Nothing runs yet.

        Args:
            wanted_by: the setting that needs them, for messages.
            prepare: runs first in every worker and must be picklable: import what is slow to import.
            preload: module that the server imports for all workers.
            count: worker processes.
            timeout_s: seconds for one check.
        """
        self._wanted_by = wanted_by
        self._prepare = prepare
        self._preload = preload
        self._count = count
        self._timeout = timeout_s
        self._pool: ProcessPool | None = None

    def run(self, checks: Sequence[Check]) -> list[Score]:
        """One score per check, in order. Raises RewardError if no worker can be started."""
        done: dict[int, Score] = {}
        # A worker that dies within an instant of taking a check may break pebble's whole pool, as it cannot tell whose
        # fault it was. The checks that were lost then run again one by one, and a pool that breaks convicts its check.
        for index in self._submit(range(len(checks)), checks, done):
            if self._submit([index], checks, done):
                self._prove_workers_start()
                done[index] = Score(0.0, problem="crash")
        return [done[index] for index in range(len(checks))]

    def close(self) -> None:
        """Stop the workers; closing twice does nothing."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def _submit(self, indices: Sequence[int], checks: Sequence[Check], done: dict[int, Score]) -> list[int]:
        """Run checks at once; returns those that were lost because the pool broke."""
        try:
            pool = self._healthy_pool()
            futures = [(i, pool.schedule(_guarded, args=(checks[i],), timeout=self._timeout)) for i in indices]
        except (RuntimeError, OSError):
            return list(indices)
        lost = []
        for index, future in futures:
            score = _outcome(future)
            if score is None:
                lost.append(index)
            else:
                done[index] = score
        return lost

    def _healthy_pool(self) -> ProcessPool:
        if self._pool is not None and not self._pool.active:
            self.close()
        if self._pool is None:
            self._pool = ProcessPool(self._count, initializer=self._prepare, context=_context(self._preload))
        return self._pool

    def _prove_workers_start(self) -> None:
        """Tell a check that kills its worker from workers that cannot start. Raises RewardError for the latter."""
        try:
            self._healthy_pool().schedule(_nothing).result(timeout=120)
        except (Exception, CancelledError) as error:
            self.close()
            raise RewardError(
                f"the worker process of {self._wanted_by} cannot start ({error!r}); try "
                f"`python -c 'import {self._preload}'`, and put the main part of your script under "
                '`if __name__ == "__main__":`'
            ) from error


def limit_memory() -> None:
    """In a worker: allow 4 GiB beyond what it has now."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on this system
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        wanted = pages * resource.getpagesize() + _MEMORY_LIMIT
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _guarded(check: Check) -> tuple[float, bool] | str:
    """Run a check; what it raises comes back as a text, as not every exception survives the way between processes."""
    try:
        value, found = check()
        return float(value), bool(found)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"[:200]


def _outcome(future: Future[tuple[float, bool] | str]) -> Score | None:
    """A check's score, or None if it was lost with its pool."""
    try:
        result = future.result()
    except TimeoutError:
        return Score(0.0, problem="timeout")
    except ProcessExpired:
        return Score(0.0, problem="crash")
    except (BrokenProcessPool, CancelledError, RuntimeError, OSError):
        return None
    except Exception:  # a check that cannot be pickled
        return Score(0.0, problem="raised")
    if isinstance(result, str):
        return Score(0.0, problem="raised")
    value, found = result
    return Score(value, parsed=found) if math.isfinite(value) else Score(0.0, problem="not finite")


def _context(preload: str) -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # only matters if nobody has started the server yet; the preparation imports it otherwise
    context.set_forkserver_preload([preload])
    return context


def _nothing() -> None:
    """Runs in a worker to show that there is one."""
