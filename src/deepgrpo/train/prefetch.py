"""Prefetching: the next batch is sampled in a thread while the learner updates on the current one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context

from deepgrpo.train.dynamic import Batch


class Prefetch:
    """At most one batch in progress, in its own thread. The thread mostly waits for other processes."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._coming: tuple[int, Future[Batch]] | None = None

    def start(self, step: int, sample: Callable[[], Batch]) -> None:
        """Start sampling the batch of a step."""
        assert self._coming is None
        self._threads = self._threads or ThreadPoolExecutor(1, "prefetch")
        self._coming = step, self._threads.submit(copy_context().run, sample)

    def wait(self) -> None:
        """Wait until no batch is in progress. Errors are raised by `take`."""
        if self._coming is not None:
            wait([self._coming[1]])

    def take(self, step: int) -> Batch | None:
        """Return the prefetched batch of a step, None if there is none. Raises the errors of its sampling."""
        if self._coming is None:
            return None
        (known, coming), self._coming = self._coming, None
        assert known == step
        return coming.result()

    def close(self) -> None:
        """Wait for the batch in progress and discard it."""
        if self._threads is not None:
            self._threads.shutdown(wait=True)
