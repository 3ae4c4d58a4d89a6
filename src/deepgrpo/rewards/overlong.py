"""A soft penalty for responses near the length limit, DAPO (arXiv:2503.14476)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.config import OverlongConfig
from deepgrpo.records import Prompt, Tree


@dataclass(frozen=True, slots=True)
class OverlongPenalty:
    """What a response loses for its length: nothing while it is short, then a straight line down to the limit.

        0                                                      length ≤ limit - cache
        -penalty · (length - (limit - cache)) / cache          above

    Lengths are in tokens, the stop token counted; of a branch, along its whole path from the prompt on. The limit is that of
    the prompt: `max_new_tokens`, or what a long prompt leaves of `max_total_tokens`; where that is less than `cache`, the line
    begins at 0. Nothing can be longer than its limit, so a response that was cut off loses `penalty`.

    Example: cache 4, penalty 1, limit 10: lengths 6, 7, 8, 10 lose 0, 0.25, 0.5, 1.
    """

    config: OverlongConfig
    max_new_tokens: int
    max_total_tokens: int

    def __call__(self, prompt: Prompt, length: int) -> float:
        """At most 0, at least -penalty."""
        limit = min(self.max_new_tokens, self.max_total_tokens - len(prompt.tokens))
        cache = min(self.config.cache, limit)
        beyond = length - (limit - cache)
        return -self.config.penalty * min(1.0, beyond / cache) if beyond > 0 else 0.0

    def metrics(self, trees: Sequence[Tree]) -> dict[str, float]:
        """Mean penalty of the rollouts of each stream: `main/reward` minus `main/overlong` is the reward without it."""
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
