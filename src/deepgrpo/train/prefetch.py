"""A batch that is sampled ahead of its turn, while the learner works on the one before."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from deepgrpo.train.dynamic import Batch


class Ahead:
    """At most one batch under way, in a thread of its own: what takes long there happens in other processes."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._coming: tuple[int, Future[Batch]] | None = None

    def start(self, step: int, sample: Callable[[], Batch]) -> None:
        """Begin with the batch of a step."""
        assert self._coming is None
        self._threads = self._threads or ThreadPoolExecutor(1, "ahead")
        self._coming = step, self._threads.submit(sample)

    def wait(self) -> None:
        """Return when nothing is under way any more. What went wrong is told by `take`."""
        if self._coming is not None:
            wait([self._coming[1]])

    def take(self, step: int) -> Batch | None:
        """The batch of that step, if it was sampled ahead. Raises what sampling it raised."""
        if self._coming is None:
            return None
        (known, coming), self._coming = self._coming, None
        assert known == step
        return coming.result()

    def close(self) -> None:
        """Let what is under way end, and forget it."""
        if self._threads is not None:
            self._threads.shutdown(wait=True)
