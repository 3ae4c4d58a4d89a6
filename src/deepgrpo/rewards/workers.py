"""Checks in worker processes: one Score each, also for a check that hangs, crashes or raises (`deepgrpo.workers`).

A failed check scores 0 with the problem "timeout", "crash", "raised", "not finite" (NaN or infinite), or "not comparable"
if it raises `NotComparableError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from deepgrpo import workers
from deepgrpo.errors import RewardError
from deepgrpo.feedback import Score
from deepgrpo.workers import Failure, limit_memory

__all__ = ["Check", "NotComparableError", "Workers", "limit_memory"]

Check = Callable[[], tuple[float, bool]]
"""Returns (value, found): the score, and True if the text has an answer. Must be picklable."""


class NotComparableError(Exception):
    """Raised by a check that cannot decide, rather than guess."""


class Workers:
    """Worker processes for checks, see `deepgrpo.workers.Workers`."""

    def __init__(
        self, wanted_by: str, prepare: Callable[[], None], preload: str, *, count: int = 1, timeout_s: float = 5.0
    ) -> None:
        self._workers = workers.Workers(wanted_by, prepare, preload, RewardError, count=count, timeout_s=timeout_s)
        self.close = self._workers.close

    def run(self, checks: Sequence[Check]) -> list[Score]:
        """One score per check, in order. Raises RewardError if no worker can be started."""
        return [
            Score(0.0, problem=found.problem) if isinstance(found, Failure) else found
            for found in self._workers.run([partial(_score, check) for check in checks])
        ]


def _score(check: Check) -> Score:
    """Runs in a worker."""
    try:
        value, found = check()
    except NotComparableError:
        return Score(0.0, problem="not comparable")
    value = float(value)
    return Score(value, parsed=bool(found)) if math.isfinite(value) else Score(0.0, problem="not finite")
