"""Cost of a run, counted alike for every method, and the report of a step. No torch"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, slots=True)
class Ledger:
    """Cost so far, counted the same way for every method. `a + b` adds field by field, `a * 2.5` multiplies likewise.

    Example: `Ledger(sampled_tokens=4096) + Ledger(verifier_calls=72)`.
    """

    sampled_tokens: int = 0
    """Tokens sampled from the policy."""
    sampled_sequences: int = 0
    prefix_tokens: int = 0
    """Prefix tokens of all continuations: the number that an engine without prefix sharing would encode."""
    prefix_tokens_encoded: int = 0
    """Prefix tokens actually encoded by the engine."""
    signal_tokens: int = 0
    """Tokens forwarded only to compute `Node.signals`."""
    given_tokens: int = 0
    """Tokens of replies of an environment: forwarded, never trained, and no part of `sampled_tokens`."""
    tool_calls: int = 0
    """Calls of tools, those of replayed episodes included."""
    learner_tokens: int = 0
    """Tokens forwarded by the learner for the update, padding excluded."""
    learner_tokens_unique: int = 0
    """Distinct tokens among them; the prompt counts once per tree."""
    trained_tokens: int = 0
    """Tokens with a loss term."""
    verifier_calls: int = 0
    optimizer_steps: int = 0
    seconds_sample: float = 0.0
    seconds_signals: float = 0.0
    seconds_reward: float = 0.0
    seconds_tools: float = 0.0
    """Time in which the environment replied."""
    seconds_learn: float = 0.0
    seconds_eval: float = 0.0
    seconds_save: float = 0.0

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __mul__(self, times: float) -> Ledger:
        """The cost of so many times as much; counts are rounded down."""
        return Ledger(**{name: type(value)(value * times) for name, value in asdict(self).items()})

    @property
    def seconds(self) -> float:
        """All seconds together."""
        return sum(value for name, value in self.as_dict().items() if name.startswith("seconds_"))

    def as_dict(self) -> dict[str, float]:
        """Field → total; the columns of an environment only where there was one."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if value or name not in OF_ENVIRONMENT}


OF_ENVIRONMENT = ("given_tokens", "tool_calls", "seconds_tools")
"""Columns of the ledger that stay 0 without an environment."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """Results of one training step: one line of metrics.jsonl.

    Example: StepReport(step=12, metrics={"main/reward": 0.45, ...}, ledger=Ledger(...), warnings=()).
    """

    step: int
    metrics: Mapping[str, float | list[float] | None]
    ledger: Ledger
    """Totals since the start of the run."""
    warnings: tuple[str, ...] = ()
