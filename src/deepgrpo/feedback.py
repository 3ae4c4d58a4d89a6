"""Feedback on the policy's text: scores of a reward and its parts, and replies of an environment. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class PartScore:
    """Score of one part of a reward that has several.

    Example: PartScore(value=1.0, weight=0.2) contributes 0.2 to `Score.value`.
    """

    value: float
    """Reward of the part, before its weight."""
    weight: float = 1.0
    problem: str | None = None
    """Failure of the part's check, as in `Score.problem`."""


@dataclass(frozen=True, slots=True)
class Score:
    """Result of scoring one completion.

    Example of a reward with parts, where `correct` says success:
    Score(0.2, outcome=0.0, parts={"correct": PartScore(0.0), "format": PartScore(1.0, weight=0.2)}).
    """

    value: float
    """The reward; of several parts, their weighted sum."""
    parsed: bool = True
    """False if the text has no answer."""
    checked: bool = True
    """False if the reward did not see the response because it was truncated."""
    problem: str | None = None
    """Failure of the check itself: "timeout", "crash", "raised", "not finite" or "not comparable"; of a judge also "no answer",
    "refused" or "unreadable"; else None."""
    outcome: float | None = None
    """The number that says success, if it is not `value`: the value of the part `reward.success`."""
    parts: Mapping[str, PartScore] = field(default_factory=dict, hash=False)
    """Parts of the reward by name; empty for a reward without parts."""

    @property
    def judged(self) -> float:
        """The number that says success: `outcome`, else `value`."""
        return self.value if self.outcome is None else self.outcome


@dataclass(frozen=True, slots=True)
class Reply:
    """Reply of an environment to a turn of the model, in a node's own tokens.

    Example, the first reply in the header of records.py: Reply(start=3, end=5, observation="7", state={"seen": [3]}, calls=1).
    """

    start: int
    """Own tokens before the reply."""
    end: int
    """Own tokens before the model's next turn; `start` if nothing was shown."""
    observation: str = ""
    """The environment's text, as it gave it."""
    state: Any = None
    """The environment's state after the turn, plain JSON; None for an environment that is replayed."""
    reward: float | None = None
    calls: int = 0
    failed_calls: int = 0
