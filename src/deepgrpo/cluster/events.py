"""Events of a cluster: each one is a line in the log and a counter."""

from __future__ import annotations

from collections.abc import Callable

from deepgrpo.errors import EngineError

KINDS = (
    "worker_lost", "worker_started", "learner_lost", "reward_worker_lost", "deadline", "node_left", "node_joined",
    "resampled_requests",
)  # fmt: skip


class LearnerLostError(Exception):
    """A learner is lost, and with it a part of the optimizer: the run must resume from its last checkpoint."""


class Events:
    """Counters since the process began. Example: `events.report("node_left", "a node has left the cluster")`.

    Args:
        max_in_a_row: lost processes without a completed step between them before `report_loss` raises.
    """

    def __init__(self, max_in_a_row: int) -> None:
        self.counts = dict.fromkeys(KINDS, 0)
        self.note: Callable[[str], None] = lambda text: None
        self.max_in_a_row, self._in_a_row = max_in_a_row, 0

    def report(self, kind: str, text: str) -> None:
        """Count and log an event."""
        self.counts[kind] += 1
        self.note(f"cluster: {text}")

    def report_loss(self, kind: str, text: str) -> None:
        """Count and log a lost process. Raises EngineError after too many in a row."""
        self.report(kind, text)
        self._in_a_row += 1
        if self._in_a_row > self.max_in_a_row:
            raise EngineError(
                f"{self._in_a_row} processes of the cluster were lost without a step between them (cluster.max_restarts = "
                f"{self.max_in_a_row}), the last one: {text}; look for what kills them (memory?) in Ray's logs, and continue "
                "with --resume"
            )

    def step_done(self) -> None:
        """Reset the count of losses in a row."""
        self._in_a_row = 0
