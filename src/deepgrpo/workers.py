"""Worker processes for jobs that may hang, crash or raise; a failure affects its own job only.

    jobs (picklable functions) ─► worker (time limit) ─► a result or a Failure each

The time limit of a job starts when a worker takes it: time in the queue and the imports of a new worker do not count.

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
from dataclasses import dataclass
from typing import Any, Literal

import psutil
from pebble import ProcessExpired, ProcessPool

from deepgrpo.errors import DeepGRPOError
from deepgrpo.processes import end_worker_with_parent

Job = Callable[[], Any]
"""Must be picklable, and so must what it returns."""

MEMORY_LIMIT = 4 << 30  # bytes; 9**9**9 would otherwise exhaust memory before its timeout
_CPU_GRACE_S = 30.0  # processor time beyond the time limit of a job
_cpu_limit_s: float | None = None  # in a worker: of a job


@dataclass(frozen=True, slots=True)
class Failure:
    """Outcome of a job without a result. Example: Failure("raised", "KeyError: 'x'")."""

    problem: Literal["timeout", "crash", "raised"]
    said: str = ""
    """The exception of a job that raised."""


class Workers:
    """Process pool, started with the first job and restarted after a job breaks it."""

    def __init__(
        self, wanted_by: str, prepare: Callable[[], None], preload: str, error: type[DeepGRPOError], *, count: int = 1,
        timeout_s: float = 5.0,
    ) -> None:  # fmt: skip
        """Start no process yet.

        Args:
            wanted_by: the setting that needs workers, for messages.
            prepare: picklable initializer of every worker, e.g. slow imports.
            preload: module that the fork server imports for all workers.
            error: raised if no worker can be started.
            count: number of worker processes.
            timeout_s: time limit of one job, in seconds.
        """
        self._wanted_by = wanted_by
        self._prepare = prepare
        self._preload = preload
        self._error = error
        self._count = count
        self._timeout = timeout_s
        self._pool: ProcessPool | None = None

    def run(self, jobs: Sequence[Job]) -> list[Any]:
        """One result or Failure per job, in order. Raises `error` if no worker can be started."""
        done: dict[int, Any] = {}
        # A worker that dies right after taking a job may break pebble's whole pool without naming the guilty job.
        # Lost jobs run again one by one; a job that breaks its pool then counts as crashed.
        for index in self._submit(range(len(jobs)), jobs, done):
            if self._submit([index], jobs, done):
                self._prove_workers_start()
                done[index] = Failure("crash")
        return [done[index] for index in range(len(jobs))]

    def close(self) -> None:
        """Stop the workers; closing twice does nothing."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def _submit(self, indices: Sequence[int], jobs: Sequence[Job], done: dict[int, Any]) -> list[int]:
        """Run jobs together; return the indices of those lost because the pool broke."""
        try:
            pool = self._healthy_pool()
            futures = [(i, pool.schedule(_guarded, args=(jobs[i],), timeout=self._timeout)) for i in indices]
        except (RuntimeError, OSError):
            return list(indices)
        from deepgrpo.progress import phase  # not in a worker

        lost = []
        with phase("jobs of workers", len(futures)) as advance:
            for index, future in futures:
                try:
                    done[index] = _outcome(future)
                except _LostError:
                    lost.append(index)
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
        """Raises `error` if workers cannot start; otherwise the lost job itself killed its worker."""
        try:
            self._healthy_pool().schedule(_nothing).result(timeout=120)
        except (Exception, CancelledError) as error:
            self.close()
            raise self._error(
                f"the worker process of {self._wanted_by} cannot start ({error!r}); try "
                f"`python -c 'import {self._preload}'`, and put the main part of your script under "
                '`if __name__ == "__main__":`'
            ) from error


class _LostError(Exception):
    """A job was lost with its pool."""


def _start_worker(prepare: Callable[[], None], timeout_s: float) -> None:
    """Initializer of every worker."""
    global _cpu_limit_s
    end_worker_with_parent()
    _cpu_limit_s = timeout_s + _CPU_GRACE_S
    prepare()


def _limit_processor() -> None:
    """Limit the processor time of the next job: where no one else ends a worker without parent, this does."""
    if _cpu_limit_s is None:
        return
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        wanted = math.ceil(time.process_time() + _cpu_limit_s)
        resource.setrlimit(resource.RLIMIT_CPU, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def limit_memory(extra: int = MEMORY_LIMIT) -> None:
    """Limit the memory of this worker to so many bytes beyond its current use."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # this system has no such limit
        import resource

        wanted = psutil.Process().memory_info().vms + extra
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _guarded(job: Job) -> Any:
    """Run a job. An exception is returned as text, because not every exception can be pickled."""
    _limit_processor()
    try:
        return job()
    except (Exception, SystemExit) as error:
        return Failure("raised", f"{type(error).__name__}: {error}"[:200])


def _outcome(future: Future[Any]) -> Any:
    """Outcome of a job. Raises _LostError."""
    try:
        return future.result()
    except TimeoutError:
        return Failure("timeout")
    except ProcessExpired:
        return Failure("crash")
    except (BrokenProcessPool, CancelledError, RuntimeError, OSError):
        raise _LostError from None
    except Exception as error:  # the job cannot be pickled
        return Failure("raised", repr(error)[:200])


def _context(preload: str) -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # without effect on a running server; the initializer then imports the module
    context.set_forkserver_preload([preload])
    return context


def _nothing() -> None:
    """Runs in a worker to prove that one can start."""
