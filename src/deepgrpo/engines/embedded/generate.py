"""Fallback for models that cannot be decoded from slots: sampling by the model's own `generate`.

The slots of `slots.py` hold one key and value per token. A model with a recurrent state or another kind of cache cannot be
decoded from them. Its rows go through the public `generate` of transformers, which handles the cache of every family;
only the token is drawn by our sampler. A draw is therefore the same function of prefix, key and weights as from slots. The
cost: every row encodes its own prefix, only prefixes of equal length share a batch (a recurrent state cannot skip padding),
and a batch runs until its last row has ended.

Shapes: B rows, P rows of a trial, T tokens, N sampled tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from deepgrpo.engines.base import SamplingParams, not_finite
from deepgrpo.engines.embedded.sampler import draw
from deepgrpo.engines.embedded.slot_gate import in_short, trial_lengths, trial_tokens, uncached_logits
from deepgrpo.engines.stops import completes_stop
from deepgrpo.errors import EngineError
from deepgrpo.model.policy import Policy
from deepgrpo.model.tree_gate import TOLERANCE
from deepgrpo.progress import phase
from deepgrpo.records import Completion, FinishReason, SampleRequest
from deepgrpo.rng import uniforms


@dataclass(frozen=True, slots=True)
class GenerateMode:
    """Arguments of `generate` that give correct results."""

    use_cache: bool = True
    """False: encode the whole row again for every token."""
    batched: bool = True
    """False: one row at a time."""


def sample_with_generate(
    policy: Policy,
    requests: Sequence[SampleRequest],
    params: SamplingParams,
    max_rows: int,
    *,
    mode: GenerateMode = GenerateMode(),
) -> tuple[list[list[Completion]], int]:
    """Continue every request once per key through the `generate` of the model.

    Args:
        policy: the policy, in evaluation mode.
        requests: as in `engines.base.Engine.sample`, already checked.
        params: the sampling distribution.
        max_rows: most rows in one call of `generate`.
        mode: result of `find_generate_mode` for the model.

    Returns:
        the completions, one list per request in order, and the number of encoded prefix tokens, every row's own.

    Raises EngineError if the logits are not finite, or if the model has no `generate`.
    """
    rows = [
        _Row(r, request.prefix, key, request.max_new_tokens, request.response)
        for r, request in enumerate(requests)
        for key in request.keys
    ]
    # rows of one limit together, as a batch runs as long as its longest row; siblings keep their order
    rows.sort(key=lambda row: (len(row.prefix), row.limit))
    size = max_rows if mode.batched else 1
    with phase("sampling", len(rows)) as advance:
        for _, equal in groupby(rows, key=lambda row: len(row.prefix)):
            group = list(equal)
            for start in range(0, len(group), size):
                part = group[start : start + size]
                _generate(policy, part, params, mode.use_cache)
                advance(len(part))
    results: list[list[Completion]] = [[] for _ in requests]
    for row in rows:
        assert row.finish is not None
        results[row.request].append(Completion(tuple(row.tokens), tuple(row.logprobs), row.finish))
    return results, sum(len(row.prefix) for row in rows)


def find_generate_mode(policy: Policy) -> GenerateMode:
    """Find the fastest mode of `generate` whose log-probs match a forward pass over the whole row.

    A model may ignore its cache (and continue a text it never saw), have one too short for its layers, or mix the rows of
    a batch (RWKV in transformers 5.23). So each mode is tried on a few short rows in float32. The policy must have float32
    weights.

    Raises EngineError if every mode is wrong, most likely because the model is not causal.
    """
    training = policy.model.training
    policy.model.eval()
    try:
        modes = (GenerateMode(), GenerateMode(batched=False), GenerateMode(use_cache=False))
        for mode in (*modes, GenerateMode(use_cache=False, batched=False)):
            objection = _objection(policy, mode)
            if objection is None:
                return mode
    finally:
        policy.model.train(training)
    raise EngineError(
        f"a model of the family {policy.causal.config.model_type!r} cannot be sampled: even one row at a time and without a "
        f"cache, {objection}. Use a causal language model; a family that can be both needs is_decoder = true in its "
        "config.json"
    )


def _objection(policy: Policy, mode: GenerateMode) -> str | None:
    """Reason why `generate` is wrong in this mode, as a clause; None if it is right."""
    lengths = trial_lengths(policy)
    # two rows of each length, to detect rows that mix within a batch
    ids_PT = trial_tokens(policy, 2 * len(lengths), max(lengths))
    requests = [
        SampleRequest(tuple(ids_T[:n].tolist()), (i,), 4)
        for i, (ids_T, n) in enumerate(zip(ids_PT, (*lengths, *lengths), strict=True))
    ]
    try:
        groups, _ = sample_with_generate(policy, requests, SamplingParams(), 2, mode=mode)
    except EngineError:
        raise
    except Exception as error:  # a model's own code may raise anything; try the next mode
        return f"it raised {in_short(error)}"
    for request, (completion,) in zip(requests, groups, strict=True):
        ids_T = torch.tensor(request.prefix + completion.tokens, device=policy.device)
        logprobs_NV = torch.log_softmax(uncached_logits(policy, ids_T[:-1], len(completion.tokens)).float(), -1)
        logprobs_N = logprobs_NV.gather(1, ids_T[len(request.prefix) :, None]).squeeze(1)
        if not np.allclose(completion.logprobs, logprobs_N.cpu(), rtol=0.0, atol=TOLERANCE):
            return "its log-probs differ from those of a forward pass over the whole row"
    return None


@dataclass
class _Row:
    """A continuation that is being sampled."""

    request: int
    prefix: tuple[int, ...]
    key: int
    limit: int
    before: tuple[int, ...]
    """Response tokens at the end of the prefix."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason | None = None


@torch.no_grad()
def _generate(policy: Policy, rows: Sequence[_Row], params: SamplingParams, use_cache: bool) -> None:
    """Sample rows of equal prefix length, in place."""
    causal = policy.causal
    if not hasattr(causal, "generate"):
        raise EngineError(
            f"the model family {causal.config.model_type!r} can be sampled neither from slots nor by a `generate` of its "
            "own; use a causal language model of transformers"
        )
    ids_BT = torch.tensor([row.prefix for row in rows], device=policy.device)
    choose = _Choose(policy, rows, params)
    plain = GenerationConfig(
        max_new_tokens=max(row.limit for row in rows), do_sample=False, use_cache=use_cache, disable_compile=True
    )
    # generate fills what our config leaves open from the model's own: penalties, forced tokens, EOS
    own, causal.generation_config = causal.generation_config, plain
    try:
        causal.generate(
            ids_BT,
            # no token of a prefix is padding, even if it has the id of the padding token
            attention_mask=torch.ones_like(ids_BT),
            generation_config=plain,
            logits_processor=LogitsProcessorList([choose]),
            stopping_criteria=StoppingCriteriaList([_Ended(choose)]),
        )
    finally:
        causal.generation_config = own


class _Choose(LogitsProcessor):
    """Draws and records the next token of every row, and masks all others so that generate's argmax picks it."""

    def __init__(self, policy: Policy, rows: Sequence[_Row], params: SamplingParams) -> None:
        self.rows, self.params, self.tokenizer = rows, params, policy.tokenizer
        self.keys = np.array([row.key for row in rows], dtype=np.uint64)
        self.eos = frozenset(policy.eos_ids)
        self.steps = 0
        self.ended_B = torch.zeros(len(rows), dtype=torch.bool, device=policy.device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        draws_B = torch.from_numpy(uniforms(self.keys, np.full(len(self.keys), self.steps)))
        seen_BV = None
        if self.params.repetition_penalty != 1.0:
            seen_BV = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, input_ids, True)
        tokens_B, logprobs_B = draw(scores, draws_B, self.params, seen_BV)
        self.steps += 1
        tokens, logprobs = tokens_B.tolist(), logprobs_B.tolist()
        for row, token, logprob in zip(self.rows, tokens, logprobs, strict=True):
            if row.finish is None:  # generate keeps feeding rows that ended; their tokens are ignored
                self._append(row, token, logprob)
        self.ended_B = torch.tensor([row.finish is not None for row in self.rows], device=scores.device)
        only: Any = torch.full_like(scores, -torch.inf).scatter_(1, tokens_B[:, None], 0.0)
        return only  # type: ignore[no-any-return]

    def _append(self, row: _Row, token: int, logprob: float) -> None:
        if not np.isfinite(logprob):
            request = SampleRequest(row.prefix, (), row.limit, len(row.prefix) - len(row.before))
            raise not_finite(self.tokenizer, request, len(row.tokens))
        row.tokens.append(token)
        row.logprobs.append(logprob)
        if token in self.eos or completes_stop(self.tokenizer, self.params.stop, row.before, row.tokens):
            row.finish = "stop"
        elif len(row.tokens) >= row.limit:
            row.finish = "length"


class _Ended(StoppingCriteria):
    """Reports to generate which rows have ended."""

    def __init__(self, choose: _Choose) -> None:
        self.choose = choose

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        ended: Any = self.choose.ended_B
        return ended  # type: ignore[no-any-return]


