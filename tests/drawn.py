"""Requests with random prompts, for whatever samples."""

from __future__ import annotations

import numpy as np

from deepgrpo import rng
from deepgrpo.model.policy import Policy
from deepgrpo.records import SampleRequest


def random_requests(policy: Policy, count: int, siblings: int = 3, new: int = 20, *, longer: int) -> list[SampleRequest]:
    """Prompts of 3, 3 + `longer`, 3 + 2 · `longer`, … tokens; always the same ones."""
    random = np.random.default_rng(1)
    return [
        SampleRequest(
            tuple(int(t) for t in random.integers(2, len(policy.tokenizer), size=3 + longer * i)),
            tuple(rng.key(0, i, s) for s in range(siblings)), new,
        )
        for i in range(count)
    ]  # fmt: skip
