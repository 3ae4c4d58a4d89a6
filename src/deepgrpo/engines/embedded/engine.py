"""The embedded engine: batched decoding with the model that is being trained, or with a bfloat16 copy of its weights.

`decode.py` is the decoding loop, over the key/value slots of `slots.py`. Models that cannot be decoded from slots are
sampled by their own `generate` (`generate.py`). Features of other engines that it does without: paged blocks (slots are as
long as the longest request needs), preemption (an admitted row runs to its end), speculative decoding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from deepgrpo.config import EmbeddedEngineConfig
from deepgrpo.engines.base import SampleStats, SamplingParams, check_requests
from deepgrpo.engines.embedded.decode import SampleCall
from deepgrpo.engines.embedded.generate import GenerateMode, find_generate_mode, sample_with_generate
from deepgrpo.engines.embedded.prefix_store import PrefixStore
from deepgrpo.engines.embedded.slot_gate import can_attach, can_extend, slot_objection
from deepgrpo.engines.embedded.weights import EngineWeights
from deepgrpo.model.policy import Policy
from deepgrpo.records import Completion, SampleRequest


class EmbeddedEngine:
    """Samples from a `Policy`, on the policy's device.

    Args:
        policy: the policy; every call uses its current weights.
        max_rows: sequences decoded at once. More rows amortize the weights that every step reads.
        keep_bytes: memory for the keys and values of rollouts that may be branched from.
        dtype: dtype of weights, keys and values while sampling; None: the policy's. If it differs from the policy's
            float32 weights, the engine copies them.
        share_prefixes: encode a prefix once for all requests that have it. False is for comparisons only.
    """

    def __init__(
        self, policy: Policy, *, max_rows: int = 64, keep_bytes: int = 0, dtype: torch.dtype | None = None,
        share_prefixes: bool = True,
    ) -> None:  # fmt: skip
        self.policy = policy
        self.weights = EngineWeights(policy, dtype or policy.dtype)
        self.max_rows, self.share_prefixes = max_rows, share_prefixes
        self.prefix_store = PrefixStore(keep_bytes)
        # bf16 attention rounds differently over one query than over a whole row, so only fp32 log-probs are the learner's
        self.exact = policy.dtype == self.weights.dtype == torch.float32
        self.slot_objection = slot_objection(policy)
        """Reason why the model is sampled by its own `generate`; None if it is decoded from slots."""
        self.generate_mode = find_generate_mode(policy) if self.slot_objection else GenerateMode()
        self.attaches_prefixes = self.slot_objection is None and can_attach(policy)
        """True if rows may read one copy of a long prefix in place."""
        self._extends: bool | None = None

    @classmethod
    def from_config(cls, policy: Policy, config: EmbeddedEngineConfig, *, dtype: torch.dtype, **_: Any) -> EmbeddedEngine:
        """Build the engine from the section `engine` of a recipe."""
        return cls(policy, max_rows=config.max_rows, keep_bytes=config.keep_mb * 2**20, dtype=dtype)

    @classmethod
    def for_evaluation(cls, policy: Policy, max_rows: int) -> EmbeddedEngine:
        """An engine that keeps the turns of episodes, within the default memory."""
        return cls(policy, max_rows=max_rows, keep_bytes=EmbeddedEngineConfig().keep_mb * 2**20)

    @torch.no_grad()
    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        """See `engines.base.Engine.sample`."""
        began = time.perf_counter()
        check_requests(requests, self.policy.context, self.policy.token_rows)
        training = self.policy.model.training
        self.policy.model.eval()
        try:
            completions, encoded = self._sample(requests, params, keep)
        finally:
            self.policy.model.train(training)
        stats = SampleStats(
            sampled_tokens=sum(len(c.tokens) for group in completions for c in group),
            prefix_tokens=sum(len(r.prefix) * len(r.keys) for r in requests),
            prefix_tokens_encoded=encoded,
            seconds=time.perf_counter() - began,
        )
        return completions, stats

    def _sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, keep: bool
    ) -> tuple[list[list[Completion]], int]:
        policy = self.weights.current()
        if self.slot_objection:
            return sample_with_generate(policy, requests, params, self.max_rows, mode=self.generate_mode)
        call = SampleCall(
            policy, requests, params, max_rows=self.max_rows, store=self.prefix_store, keep=keep,
            attach=self.attaches_prefixes, share_prefixes=self.share_prefixes,
            extend=any(request.known for request in requests) and self.extends_prefixes,
        )  # fmt: skip
        call.run()
        return call.completions, call.encoded_tokens

    @property
    def extends_prefixes(self) -> bool:
        """True if the next turn of an episode encodes only what is new. Tested when it is first needed."""
        if self._extends is None:
            self._extends = self.slot_objection is None and can_extend(self.policy)
        return self._extends

    @property
    def remark(self) -> str | None:
        """See `engines.base.Engine.remark`."""
        if self.slot_objection is None:
            return None
        mode = self.generate_mode
        cost = "every branch encodes its prefix" if mode.use_cache else "without a cache, every token encodes its prefix"
        alone = "" if mode.batched else ", one row at a time"
        family = self.policy.causal.config.model_type
        return f"sampled by the model's own generate{alone}: {family} {self.slot_objection}; {cost}"

    def forget(self) -> None:
        """See `engines.base.Engine.forget`."""
        self.prefix_store.clear()

    def close(self) -> None:
        """See `engines.base.Engine.close`."""
        self.prefix_store.clear()
