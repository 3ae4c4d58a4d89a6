"""Pending calls to Ray actors, each with a deadline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError

from deepgrpo.cluster.events import Events

T = TypeVar("T")


class Calls(Generic[T]):
    """Iterates over (subject, answer) in the order of the answers; calls may be added during the iteration.

    An answer is an exception if the call failed or missed its deadline.

    Args:
        key: the recipe's key of the deadline, for messages.
        deadline_s: seconds for each call.

    Example: `for subject, answer in calls: ...`.
    """

    def __init__(self, key: str, deadline_s: float) -> None:
        self.key, self.deadline_s = key, deadline_s
        self._pending: dict[Any, tuple[T, float]] = {}

    def add(self, reference: Any, subject: T) -> None:
        """Add a call that was just made.

        Args:
            reference: Ray's reference to its answer.
            subject: returned with the answer.
        """
        self._pending[reference] = subject, time.monotonic() + self.deadline_s

    def __iter__(self) -> Iterator[tuple[T, Any]]:
        while self._pending:
            patience = min(limit for _, limit in self._pending.values()) - time.monotonic()
            ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=max(0.0, patience))
            now = time.monotonic()
            for reference in ready or [each for each, (_, limit) in self._pending.items() if limit <= now]:
                subject, _ = self._pending.pop(reference)
                try:
                    answer = ray.get(reference, timeout=0)
                except (RayError, TimeoutError) as error:
                    answer = error
                yield subject, answer

    def reason(self, error: Exception, events: Events) -> str:
        """Describe why a process did not answer; a missed deadline is counted."""
        if not isinstance(error, TimeoutError | GetTimeoutError):
            return "has died"
        events.counts["deadline"] += 1
        return f"gave no answer within {self.key} = {self.deadline_s:g}"
