"""Soft overlong penalty for responses near the length limit, DAPO (arXiv:2503.14476)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.config import OverlongConfig
from deepgrpo.records import Prompt, Tree


@dataclass(frozen=True, slots=True)
class OverlongPenalty:
    """Length penalty: 0 up to `cache` tokens before the limit, then linear down to -`penalty` at the limit.

        0                                                      length ≤ limit - cache
        -penalty · (length - (limit - cache)) / cache          above

    Lengths are in tokens, stop token included; a branch counts from the prompt on. The limit of a prompt is
    min(`max_new_tokens`, `max_total_tokens` - prompt length); `cache` is capped at that limit. No response is longer
    than its limit, so a truncated response loses exactly `penalty`.

    Example: cache 4, penalty 1, limit 10: lengths 6, 7, 8, 10 lose 0, 0.25, 0.5, 1.
    """

    config: OverlongConfig
    max_new_tokens: int
    max_total_tokens: int

    def __call__(self, prompt: Prompt, length: int) -> float:
        """Penalty in [-penalty, 0] for a response of `length` tokens."""
        limit = min(self.max_new_tokens, self.max_total_tokens - len(prompt.tokens))
        cache = min(self.config.cache, limit)
        beyond = length - (limit - cache)
        return -self.config.penalty * min(1.0, beyond / cache) if beyond > 0 else 0.0

    def metrics(self, trees: Sequence[Tree]) -> dict[str, float]:
        """Mean penalty per stream, e.g. `main/overlong`; `main/reward` minus it is the reward without penalty."""
        found: dict[str, float] = {}
        for stream in ("main", "branch"):
            lost = [
                self(tree.prompt, len(tree.response(index)))
                for tree in trees
                for index, node in tree.stream(stream)
                if node.finish != "segment"  # not a response yet
            ]
            if lost:
                found[f"{stream}/overlong"] = float(np.mean(lost))
        return found
