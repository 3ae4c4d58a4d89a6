"""Memory of the health monitor between steps: streaks, the first entropy, and the causes already reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

Metrics = Mapping[str, float | list[float] | None]
See = Callable[[str], float | None]
"""Name of a metric → its value; None if it is missing or not finite."""


@dataclass(frozen=True, slots=True)
class HealthState:
    """The monitor's memory between steps.

    Example: HealthState(active=("truncated",), dead=3, empty=0, first_entropy=0.61).
    """

    active: tuple[str, ...] = ()
    """Reported causes that have not gone away, sorted."""
    dead: int = 0
    """Steps in a row without a mixed group."""
    empty: int = 0
    """Steps in a row without a branch."""
    few: int = 0
    """Steps in a row with few branches and full lambda."""
    first_entropy: float | None = None
    """Entropy of the run's first step, in nats."""

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON values; `from_dict` is the inverse."""
        return {**asdict(self), "active": list(self.active)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> HealthState:
        return cls(tuple(raw["active"]), raw["dead"], raw["empty"], raw.get("few", 0), raw["first_entropy"])

    def after(self, see: See, *, few_share: float) -> HealthState:
        """The state after a step, before its causes are judged.

        Args:
            see: reads the step's metrics.
            few_share: branch rows as a share of main rows below which they are few; 0: not watched.
        """
        state = self
        mixed, branch_mixed, sequences = see("main/mixed"), see("branch/mixed"), see("branch/sequences")
        if mixed is not None:
            # branches of a failed group may disagree; then the step does learn
            state = replace(state, dead=state.dead + 1 if mixed <= 0 and not (branch_mixed or 0) > 0 else 0)
        if sequences is not None:
            # a strategy may train its branches in the main stream: then there are pivots and no branch groups, or mixed
            # ones whose rows are not in the branch stream although none was dropped
            moved = (branch_mixed or 0) > 0 and not see("loss/dropped_few_branches")
            elsewhere = (see("pivots/count") or 0) > 0 and (see("branch/groups") is None or moved)
            few = 0 < sequences < few_share * (see("main/sequences") or 0)
            state = replace(
                state, empty=state.empty + 1 if sequences <= 0 and not elsewhere else 0, few=state.few + 1 if few else 0
            )
        if state.first_entropy is None:
            state = replace(state, first_entropy=see("main/entropy"))
        return state


def finite(metrics: Metrics, name: str) -> float | None:
    """The metric as a finite float, or None."""
    value = metrics.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
