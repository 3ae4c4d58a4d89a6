"""What an engine is: something that continues prefixes. Growth and evaluation know nothing more of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from deepgrpo.errors import EngineError
from deepgrpo.records import Completion, SampleRequest

NOT_FINITE = (
    "the logits of the policy are not finite, so nothing can be sampled: the weights have overflowed. Lower "
    "optim.lr and continue from an earlier checkpoint with --resume, or check the weights of model.path"
)
"""What an engine says of log-probs that are infinite or NaN."""


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
    """Prefix tokens that were really encoded: the others were found among what was encoded or sampled before, for a sibling
    in the same call or in an earlier one."""
    seconds: float = 0.0

    @property
    def reused(self) -> float:
        """The share of prefix tokens that need not be encoded; 0 if there were none."""
        return 1 - self.prefix_tokens_encoded / self.prefix_tokens if self.prefix_tokens else 0.0

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

    def close(self) -> None:
        """The run is over: end whatever the engine has started. It may be called twice."""
        ...


def check_requests(requests: Sequence[SampleRequest], context: int) -> None:
    """Raise EngineError if a request cannot be served by any engine whose rows hold `context` tokens."""
    for request in requests:
        longest = len(request.prefix) + request.max_new_tokens
        if not request.prefix:
            raise EngineError("a prompt has no tokens; give it at least one (a BOS token or a template)")
        if request.max_new_tokens < 1:
            raise EngineError(f"max_new_tokens is {request.max_new_tokens} after a prefix of {len(request.prefix)} tokens")
        if longest > context:
            raise EngineError(
                f"a prefix of {len(request.prefix)} tokens plus {request.max_new_tokens} new ones is {longest}, but the "
                f"model's context is {context}; lower sampling.max_new_tokens or data.max_prompt_tokens"
            )
