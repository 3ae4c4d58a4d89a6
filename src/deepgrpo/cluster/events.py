"""What went wrong and was put right: a line in the log and a counter for each."""

from __future__ import annotations

from collections.abc import Callable

from deepgrpo.errors import EngineError

KINDS = (
    "worker_lost", "worker_started", "learner_lost", "reward_worker_lost", "deadline", "node_left", "node_joined",
    "resampled_requests",
)  # fmt: skip


class LearnerLostError(Exception):
    """A learner is gone, and with it a part of the optimizer: the run comes back from its last checkpoint."""


class Events:
    """Counts since the process began. Example: `events.tell("node_left", "a node has left the cluster")`."""

    def __init__(self, max_in_a_row: int) -> None:
        self.counts = dict.fromkeys(KINDS, 0)
        self.note: Callable[[str], None] = lambda text: None
        self.max_in_a_row, self._in_a_row = max_in_a_row, 0

    def tell(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        self.note(f"cluster: {text}")

    def lost(self, kind: str, text: str) -> None:
        """A process is gone. Raises EngineError if that has become a habit."""
        self.tell(kind, text)
        self._in_a_row += 1
        if self._in_a_row > self.max_in_a_row:
            raise EngineError(
                f"{self._in_a_row} processes of the cluster were lost without a step between them (cluster.max_restarts = "
                f"{self.max_in_a_row}), the last one: {text}; look for what kills them (memory?) in Ray's logs, and continue "
                "with --resume"
            )

    def step_done(self) -> None:
        self._in_a_row = 0
