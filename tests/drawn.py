"""Requests with random prompts, for whatever samples; and the distributions that transformers samples from."""

from __future__ import annotations

from typing import Any

import numpy as np

from deepgrpo import rng
from deepgrpo.engines.base import SamplingParams
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


def processors_of(params: SamplingParams) -> Any:
    """The processors of `generate` for these parameters, in its order."""
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as known

    found = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        found.append(known.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1.0:
        found.append(known.TemperatureLogitsWarper(params.temperature))
    if params.top_k is not None:
        found.append(known.TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        found.append(known.TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        found.append(known.MinPLogitsWarper(params.min_p))
    return found
