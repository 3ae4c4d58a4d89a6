"""What an engine is: something that continues prefixes. Growth and evaluation know nothing more of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deepgrpo.records import Completion, SampleRequest


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The distribution that tokens are drawn from.

    Example: SamplingParams(temperature=1.0) for training, SamplingParams(greedy=True) for evaluation.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False
    """Take the most likely token; `logprobs` are then those of temperature 1."""
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SampleStats:
    """What a call to `sample` cost, for the ledger."""

    sampled_tokens: int = 0
    prefix_tokens: int = 0
    """Prefix length times continuations, summed: the cost without any sharing."""
    prefix_tokens_encoded: int = 0
    """Prefix tokens that were really encoded."""
    seconds: float = 0.0

    def __add__(self, other: SampleStats) -> SampleStats:
        return SampleStats(
            self.sampled_tokens + other.sampled_tokens,
            self.prefix_tokens + other.prefix_tokens,
            self.prefix_tokens_encoded + other.prefix_tokens_encoded,
            self.seconds + other.seconds,
        )


class Engine(Protocol):
    """Continues prefixes with the current policy."""

    exact: bool
    """Whether the log-probs of sampled tokens are the learner's own up to rounding (same weights, same dtype)."""

    @property
    def remark(self) -> str | None:
        """What a user should know of how this model is sampled, as one line; None if there is nothing."""
        ...

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        """Continue every request once per key.

        With `keep`, what was encoded and sampled may be asked for again as a prefix before the weights change: an engine
        that can keeps it until `forget`, within its memory.

        Returns one list per request, in order, with one completion per key, in order. A completion depends on its
        prefix, its key and the policy only, never on what else is in the batch.
        Raises EngineError if a request cannot be served (an empty prefix, a path longer than the model's context).
        """
        ...

    def forget(self) -> None:
        """Nobody will come back to what was kept."""
        ...
