"""Worker processes for checks that may hang, crash or raise; a failure affects its own sample only.

    checks (picklable functions) ─► worker (time limit) ─► one Score each

A failed check scores 0 with the problem "timeout", "crash", "raised", "not finite" (NaN or infinite), or "not comparable"
if it raises `NotComparableError`. The time limit
of a check starts when a worker takes it: time in the queue and the imports of a new worker do not count.

Workers are forked from a small server process without torch, so a killed worker is replaced within milliseconds.
Systems without fork servers (Windows) spawn them. As always with `multiprocessing`, a training script needs
`if __name__ == "__main__":` around its main part.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, TimeoutError
from concurrent.futures.process import BrokenProcessPool

import psutil
from pebble import ProcessExpired, ProcessPool

from deepgrpo.errors import RewardError
from deepgrpo.processes import end_worker_with_parent
from deepgrpo.progress import phase
from deepgrpo.records import Score

Check = Callable[[], tuple[float, bool]]
"""Returns (value, found): the score, and True if the text has an answer. Must be picklable."""

_MEMORY_LIMIT = 4 << 30  # bytes; 9**9**9 would otherwise exhaust memory before its timeout
_CPU_GRACE_S = 30.0  # processor time beyond the time limit of a check
_cpu_limit_s: float | None = None  # in a worker: of a check


class NotComparableError(Exception):
    """Raised by a check that cannot decide, rather than guess."""


class Workers:
    """Process pool, started with the first check and restarted after a check breaks it."""

    def __init__(
        self, wanted_by: str, prepare: Callable[[], None], preload: str, *, count: int = 1, timeout_s: float = 5.0
    ) -> None:
        """Start no process yet.

        Args:
            wanted_by: the setting that needs workers, for messages.
            prepare: picklable initializer of every worker, e.g. slow imports.
            preload: module that the fork server imports for all workers.
            count: number of worker processes.
            timeout_s: time limit of one check, in seconds.
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
        # A worker that dies right after taking a check may break pebble's whole pool without naming the guilty check.
        # Lost checks run again one by one; a check that breaks its pool then counts as crashed.
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
        """Run checks together; return the indices of those lost because the pool broke."""
        try:
            pool = self._healthy_pool()
            futures = [(i, pool.schedule(_guarded, args=(checks[i],), timeout=self._timeout)) for i in indices]
        except (RuntimeError, OSError):
            return list(indices)
        lost = []
        with phase("scoring", len(futures)) as advance:
            for index, future in futures:
                score = _outcome(future)
                if score is None:
                    lost.append(index)
                else:
                    done[index] = score
                advance()
        return lost

    def _healthy_pool(self) -> ProcessPool:
        if self._pool is not None and not self._pool.active:
            self.close()
        if self._pool is None:
            self._pool = ProcessPool(
                self._count, initializer=_start_worker, initargs=(self._prepare, self._timeout), context=_context(self._preload)
            )
        return self._pool

    def _prove_workers_start(self) -> None:
        """Raises RewardError if workers cannot start; otherwise the lost check itself killed its worker."""
        try:
            self._healthy_pool().schedule(_nothing).result(timeout=120)
        except (Exception, CancelledError) as error:
            self.close()
            raise RewardError(
                f"the worker process of {self._wanted_by} cannot start ({error!r}); try "
                f"`python -c 'import {self._preload}'`, and put the main part of your script under "
                '`if __name__ == "__main__":`'
            ) from error


def _start_worker(prepare: Callable[[], None], timeout_s: float) -> None:
    """Initializer of every worker."""
    global _cpu_limit_s
    end_worker_with_parent()
    _cpu_limit_s = timeout_s + _CPU_GRACE_S
    prepare()


def _limit_processor() -> None:
    """Limit the processor time of the next check: where no one else ends a worker without parent, this does."""
    if _cpu_limit_s is None:
        return
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        wanted = math.ceil(time.process_time() + _cpu_limit_s)
        resource.setrlimit(resource.RLIMIT_CPU, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def limit_memory() -> None:
    """Limit the memory of this worker to 4 GiB beyond its current use."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # this system has no such limit
        import resource

        wanted = psutil.Process().memory_info().vms + _MEMORY_LIMIT
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _guarded(check: Check) -> tuple[float, bool] | Score | str:
    """Run a check. An exception is returned as text, because not every exception can be pickled."""
    _limit_processor()
    try:
        value, found = check()
        return float(value), bool(found)
    except NotComparableError:
        return Score(0.0, problem="not comparable")
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"[:200]


def _outcome(future: Future[tuple[float, bool] | Score | str]) -> Score | None:
    """Score of a check, or None if it was lost with its pool."""
    try:
        result = future.result()
    except TimeoutError:
        return Score(0.0, problem="timeout")
    except ProcessExpired:
        return Score(0.0, problem="crash")
    except (BrokenProcessPool, CancelledError, RuntimeError, OSError):
        return None
    except Exception:  # the check cannot be pickled
        return Score(0.0, problem="raised")
    if isinstance(result, Score):
        return result
    if isinstance(result, str):
        return Score(0.0, problem="raised")
    value, found = result
    return Score(value, parsed=found) if math.isfinite(value) else Score(0.0, problem="not finite")


def _context(preload: str) -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # without effect on a running server; the initializer then imports the module
    context.set_forkserver_preload([preload])
    return context


def _nothing() -> None:
    """Runs in a worker to prove that one can start."""
