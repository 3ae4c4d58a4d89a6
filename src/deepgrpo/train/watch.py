"""Watchers: told what a run has done, step by step. They cannot change it; an error of theirs ends it, as any other would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepgrpo.ledger import StepReport
from deepgrpo.records import Tree


class Watcher:
    """A watcher that does nothing."""

    def stepped(self, report: StepReport, trees: Sequence[Tree]) -> None:
        """A step was taken and logged; the report also has the figures of an evaluation that was due after it."""

    def evaluated(self, report: StepReport) -> None:
        """The policy was evaluated outside of a step, such as before the first one."""

    def saved(self, step: int, checkpoint: Path) -> None:
        """A checkpoint was written."""
