"""An engine that samples every draw once: strategies that share rollouts from the prompt share their cost in a probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from deepgrpo.engines.base import Engine, SampleStats, SamplingParams
from deepgrpo.records import Completion, SampleRequest


@dataclass
class RememberingEngine:
    """Returns completions that it has returned before; a completion depends on prefix, key, length and policy only.

    The policy must not change. The stats are those of what was really sampled.
    """

    engine: Engine
    exact: bool = field(init=False)
    _known: dict[tuple[object, ...], Completion] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.exact = self.engine.exact

    @property
    def remark(self) -> str | None:
        return self.engine.remark

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        """See `Engine.sample`."""

        def place(request: SampleRequest, key: int) -> tuple[object, ...]:
            return (request.prefix, key, request.max_new_tokens, params)

        missing = [
            replace(request, keys=tuple(key for key in request.keys if place(request, key) not in self._known))
            for request in requests
        ]
        asked = [request for request in missing if request.keys]
        stats = SampleStats()
        if asked:
            completions, stats = self.engine.sample(asked, params, keep=keep)
            for request, found in zip(asked, completions, strict=True):
                self._known |= {place(request, key): each for key, each in zip(request.keys, found, strict=True)}
        return [[self._known[place(request, key)] for key in request.keys] for request in requests], stats

    def forget(self) -> None:
        self.engine.forget()

    def clear(self) -> None:
        """Drop all completions."""
        self._known.clear()

    def close(self) -> None:
        self.engine.close()
