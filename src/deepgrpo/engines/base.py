"""The engine protocol: continue prefixes with the current policy. Growth and evaluation depend on nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Protocol

from deepgrpo.config import SamplingConfig
from deepgrpo.errors import EngineError
from deepgrpo.records import Completion, SampleRequest


def not_finite(tokenizer: Any, request: SampleRequest, drawn: int) -> EngineError:
    """Error for logits from which no token can be drawn.

    Args:
        drawn: tokens of the response that were drawn before, behind `request.prefix`.
    """
    prompt = tokenizer.decode(request.prefix[: len(request.prefix) - len(request.response)]).strip()
    return EngineError(
        f"the logits of the policy are not finite (NaN, or -inf for every token) after {len(request.response) + drawn} tokens "
        f"of a response to the prompt that ends in {prompt[-60:]!r}, so nothing can be sampled: the weights have overflowed, "
        "or the model masks its whole vocabulary. Lower optim.lr and continue from an earlier checkpoint with --resume, or "
        "check the weights of model.path"
    )


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of the sampling distribution.

    Example: SamplingParams(temperature=1.0) for training, SamplingParams(greedy=True) for evaluation.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False
    """Take the most likely token, whatever the other parameters; `logprobs` are reported at temperature 1."""
    stop: tuple[str, ...] = ()
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, config: SamplingConfig) -> SamplingParams:
        """The parameters of a recipe's section."""
        return cls(
            config.temperature, config.top_p, stop=config.stop, top_k=config.top_k, min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SampleStats:
    """Cost of one call to `sample`, for the ledger."""

    sampled_tokens: int = 0
    prefix_tokens: int = 0
    """Sum of prefix length times continuations: the cost without any reuse."""
    prefix_tokens_encoded: int = 0
    """Prefix tokens that were encoded; the rest reused keys and values of a sibling or of an earlier call."""
    seconds: float = 0.0

    @property
    def reused(self) -> float:
        """Fraction of prefix tokens that were reused instead of encoded; 0 without prefix tokens."""
        return 1 - self.prefix_tokens_encoded / self.prefix_tokens if self.prefix_tokens else 0.0

    def __add__(self, other: SampleStats) -> SampleStats:
        return SampleStats(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


class Engine(Protocol):
    """Continues prefixes with the current policy."""

    exact: bool
    """True if log-probs of sampled tokens equal the learner's up to rounding (same weights, same dtype)."""

    @property
    def remark(self) -> str | None:
        """One line about how this model is sampled that a user should know; None if there is nothing to say."""

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        """Continue every request once per key.

        `keep` announces that sampled responses will be branched from before the weights change. An engine that can
        stores their keys and values until `forget`, within its memory.

        Returns one list per request, in order, with one completion per key, in order. A completion depends on its
        prefix, its key and the policy only, never on what else is in the batch.
        Raises EngineError if a request cannot be served (an empty prefix, a path longer than the model's context).
        """

    def forget(self) -> None:
        """Drop stored rollouts."""

    def close(self) -> None:
        """Release everything that the engine has started. Safe to call twice."""


def check_requests(requests: Sequence[SampleRequest], context: int, token_rows: int | None = None) -> None:
    """Raise EngineError if a request does not fit into a context of `context` tokens, or asks for nothing.

    Args:
        token_rows: rows of the model's embeddings; a token without a row is refused. None: not checked.
    """
    for request in requests:
        if token_rows is not None and max(request.prefix, default=0) >= token_rows:
            raise EngineError(
                f"a prefix has the token id {max(request.prefix)}, but the model has embeddings for the ids below "
                f"{token_rows:,} only; use the model's own tokenizer (model.tokenizer)"
            )
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


@contextmanager
def named(what: str) -> Iterator[None]:
    """Begin the message of an engine's error inside the block with the place in the run, such as "step 3"."""
    try:
        yield
    except EngineError as error:
        error.args = (f"{what}: {error}",)
        raise
