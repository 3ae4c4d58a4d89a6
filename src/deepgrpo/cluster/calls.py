"""Calls to other processes that are under way, each with a deadline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError

from deepgrpo.cluster.events import Events

T = TypeVar("T")


class Calls(Generic[T]):
    """Answers in the order in which they come; more calls may be added meanwhile.

    Args:
        key: of the recipe, that sets the deadline.
        deadline_s: seconds for each call.

    Example: `for what, answer in calls: ...`, where `answer` is an exception if the call failed or came too late.
    """

    def __init__(self, key: str, deadline_s: float) -> None:
        self.key, self.deadline_s = key, deadline_s
        self._running: dict[Any, tuple[T, float]] = {}

    def add(self, answer: Any, what: T) -> None:
        """A call that was just made: Ray's reference to its answer, and what it was about."""
        self._running[answer] = what, time.monotonic() + self.deadline_s

    def __iter__(self) -> Iterator[tuple[T, Any]]:
        while self._running:
            patience = min(limit for _, limit in self._running.values()) - time.monotonic()
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=max(0.0, patience))
            now = time.monotonic()
            for answer in ready or [a for a, (_, limit) in self._running.items() if limit <= now]:
                what, _ = self._running.pop(answer)
                try:
                    found = ray.get(answer, timeout=0)
                except (RayError, TimeoutError) as error:
                    found = error
                yield what, found

    def why(self, error: Exception, events: Events) -> str:
        """What is to be said of a process that did not answer; a deadline is counted."""
        if not isinstance(error, TimeoutError | GetTimeoutError):
            return "has died"
        events.counts["deadline"] += 1
        return f"gave no answer within {self.key} = {self.deadline_s:g}"
