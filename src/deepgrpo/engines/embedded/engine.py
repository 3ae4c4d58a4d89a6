"""Batched decoding with the very model that is being trained (or a copy of its weights in bfloat16).

One loop: admit waiting rows into free slots (their prefix is encoded once for all siblings), run one step for all
active rows, draw, take out the rows that ended, put the last rows into their slots. A row's draw depends on its prefix,
its key and the weights; neighbours change nothing but the rounding.

A row has a copy of its prefix in its slot. Where many siblings share a long prefix that copy is left out, and all of them
read the one that was encoded (`model/decode_attention.py`): more arithmetic per byte, and memory for one prefix.

What a textbook engine has and this one leaves out: paged blocks (slots are as long as the longest request needs),
preemption (a row that is admitted runs to its end), speculative decoding.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from deepgrpo.engines.base import NOT_FINITE, SampleStats, SamplingParams, check_requests
from deepgrpo.engines.embedded.generate import GenerateWay, generate_way, sample_with_generate
from deepgrpo.engines.embedded.prefix_store import PrefixStore
from deepgrpo.engines.embedded.sampler import draw
from deepgrpo.engines.embedded.slot_gate import decoding_mask, may_share, why_no_slots, windows_of
from deepgrpo.engines.embedded.slots import Prefix, SlotCache
from deepgrpo.engines.embedded.weights import EngineWeights
from deepgrpo.engines.stops import completes_stop
from deepgrpo.errors import EngineError
from deepgrpo.model.decode_attention import DecodePlan, SharedPrefix
from deepgrpo.model.policy import Policy
from deepgrpo.records import Completion, FinishReason, SampleRequest
from deepgrpo.rng import uniforms

PREFILL_TOKENS = 16_384
"""Most tokens (padding included) in one prefill pass."""

SHARED_TOKENS, SHARED_COPIES = 256, 2048
"""A prefix of at least so many tokens, whose copies for all siblings would hold so many, is read where it is. Measured on
two CPU cores: 8 siblings behind 320 tokens decode 1.1 times as fast, behind 2,048 tokens twice; shorter ones slower."""


class EmbeddedEngine:
    """Samples from a `Policy`, on whatever device it lives.

    Args:
        policy: the policy; its current weights are used at every call.
        max_rows: sequences decoded at once. More rows make better use of the weights that each step reads.
        keep_bytes: memory for the keys and values of rollouts that branches may come back to.
        dtype: of weights, keys and values while sampling; None: as the policy computes. Other than the policy's float32
            it takes a copy of the weights.
        share_prefixes: False makes every request encode its prefix, as if no other had the same: for comparisons only.
    """

    def __init__(
        self, policy: Policy, *, max_rows: int = 64, keep_bytes: int = 0, dtype: torch.dtype | None = None,
        share_prefixes: bool = True,
    ) -> None:  # fmt: skip
        self.policy = policy
        self.weights = EngineWeights(policy, dtype or policy.dtype)
        self.max_rows, self.share_prefixes = max_rows, share_prefixes
        self.kept = PrefixStore(keep_bytes)
        # bf16 attention rounds differently over one query than over a whole row, so only fp32 log-probs are the learner's
        self.exact = policy.dtype == self.weights.dtype == torch.float32
        self.no_slots = why_no_slots(policy)
        """Why the model's rows go through its own `generate`; None if they are decoded from slots."""
        self.way = generate_way(policy) if self.no_slots else GenerateWay()
        self.shares = self.no_slots is None and may_share(policy)

    @torch.no_grad()
    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        """See `engines.base.Engine.sample`."""
        began = time.perf_counter()
        check_requests(requests, self.policy.context)
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
        if self.no_slots:
            return sample_with_generate(policy, requests, params, self.max_rows, way=self.way)
        call = _Call(policy, requests, params, self.max_rows, self.kept, keep, self.shares, self.share_prefixes)
        call.run()
        return call.completions, call.encoded_tokens

    @property
    def remark(self) -> str | None:
        """See `engines.base.Engine.remark`."""
        if self.no_slots is None:
            return None
        cost = "every branch encodes its prefix" if self.way.use_cache else "without a cache, every token encodes its prefix"
        alone = "" if self.way.together else ", one row at a time"
        family = self.policy.causal.config.model_type
        return f"sampled by the model's own generate{alone}: {family} {self.no_slots}; {cost}"

    def forget(self) -> None:
        """See `engines.base.Engine.forget`."""
        self.kept.clear()

    def close(self) -> None:
        """See `engines.base.Engine.close`."""
        self.kept.clear()


@dataclass
class _Row:
    """A continuation that is being sampled."""

    request: int
    sibling: int
    limit: int
    prefix: Prefix
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class _Call:
    """The state of one `sample` call."""

    def __init__(
        self, policy: Policy, requests: Sequence[SampleRequest], params: SamplingParams, max_rows: int,
        kept: PrefixStore, keep: bool, sharing: bool, merge: bool = True,
    ) -> None:  # fmt: skip
        self.policy, self.requests, self.params, self.merge = policy, requests, params, merge
        self.waiting = deque((r, s) for r, request in enumerate(requests) for s in range(len(request.keys)))
        self.rows: list[_Row] = []
        self.max_rows = min(max_rows, max(1, len(self.waiting)))
        self.prefixes: dict[int, Prefix] = {}
        self.left = [len(request.keys) for request in requests]
        self.results: list[list[Completion | None]] = [[None] * len(request.keys) for request in requests]
        self.encoded_tokens = 0
        device = policy.device
        self.windows = windows_of(policy)
        # by the request alone, so that a row computes the same whatever else is sampled
        self.shares = [
            sharing and len(r.prefix) >= SHARED_TOKENS and len(r.prefix) * len(r.keys) >= SHARED_COPIES for r in requests
        ]
        slot_length = max(
            (r.max_new_tokens + (0 if shares else len(r.prefix)) for r, shares in zip(requests, self.shares, strict=True)),
            default=1,
        )
        self.cache = SlotCache(
            policy.causal.config.num_hidden_layers, self.max_rows, slot_length, device, policy.dtype
        )
        self.plan: DecodePlan | None = None
        """Who shares a prefix among the active rows."""
        self.last = torch.zeros(self.max_rows, dtype=torch.long, device=device)
        self.keys = np.zeros(self.max_rows, dtype=np.uint64)
        self.counts = np.zeros(self.max_rows, dtype=np.int64)
        self.eos = np.array(policy.eos_ids)
        self.kept = kept
        # logits instead of hidden states would take too much memory to keep
        self.keep = keep and kept.budget > 0 and policy.plain_head
        self.hidden: Tensor | None = None
        """`[rows, new tokens, H]` last hidden states from the end of the prefix on, if rollouts are kept."""

    @property
    def completions(self) -> list[list[Completion]]:
        return [[c for c in group if c is not None] for group in self.results]

    def run(self) -> None:
        while self.waiting or self.rows:
            self._admit()
            if self.rows:
                self._advance(0, self._step())

    def _admit(self) -> None:
        """Fill free slots with waiting rows, and draw their first token from the logits of their prefix."""
        while self.waiting and len(self.rows) < self.max_rows:
            first = len(self.rows)
            batch = [self.waiting.popleft() for _ in range(min(self.max_rows - first, len(self.waiting)))]
            self._encode([r for r in dict.fromkeys(r for r, _ in batch) if r not in self.prefixes])
            output = []
            slots_of: dict[int, list[int]] = {}
            for r, s in batch:
                slot = len(self.rows)
                slots_of.setdefault(r, []).append(slot)
                self.keys[slot], self.counts[slot] = self.requests[r].keys[s], 0
                self.rows.append(_Row(r, s, self.requests[r].max_new_tokens, self.prefixes[r]))
                output.append(self.prefixes[r].last)
            for r, slots in slots_of.items():
                place = self.cache.attach if self.shares[r] else self.cache.fill
                place(torch.tensor(slots, device=self.last.device), self.prefixes[r])
                self.left[r] -= len(slots)
                if not self.left[r]:
                    del self.prefixes[r]  # from here on only its rows need it
            self._plan()
            self._advance(first, self._remember(first, torch.stack(output)))

    def _encode(self, wanted: list[int]) -> None:
        """Encode each distinct prefix once, in right-padded batches of similar length; not at all if it was kept."""
        same: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for r in wanted:
            prefix = self.requests[r].prefix
            known = self.kept.find(prefix)
            if known is not None:
                self.prefixes[r] = known
            else:
                same.setdefault((prefix, 0 if self.merge else r), []).append(r)
        ordered = sorted(same, key=lambda each: len(each[0]))
        while ordered:
            count = 1
            while count < len(ordered) and (count + 1) * len(ordered[count][0]) <= PREFILL_TOKENS:
                count += 1
            part, ordered = ordered[:count], ordered[count:]
            width = len(part[-1][0])
            ids_PT = torch.zeros(len(part), width, dtype=torch.long)
            for i, (prefix, _) in enumerate(part):
                ids_PT[i, : len(prefix)] = torch.tensor(prefix)
            # without a config the cache keeps all positions of sliding-window layers too, as branches may need them
            cache = DynamicCache()
            ends = torch.tensor([i * width + len(prefix) - 1 for i, (prefix, _) in enumerate(part)])
            output = self.policy.run(
                ends.to(self.last.device), input_ids=ids_PT.to(self.last.device), past_key_values=cache, use_cache=True
            )
            for i, (prefix, own) in enumerate(part):
                # contiguous, so that a prefix can be read and kept without the padding of its batch
                layers = [
                    (layer.keys[i, :, : len(prefix)].contiguous(), layer.values[i, :, : len(prefix)].contiguous())
                    for layer in cache.layers
                ]
                for r in same[prefix, own]:
                    self.prefixes[r] = Prefix(layers, output[i])
                self.encoded_tokens += len(prefix)

    def _step(self) -> Tensor:
        """Feed every active row its last token; `[B, V]` logits."""
        active = len(self.rows)
        self.cache.begin_step(active)
        output = self.policy.run(
            self.cache.rows,
            input_ids=self.last[:active, None],
            position_ids=self.cache.positions[:, None],
            attention_mask=decoding_mask(
                self.windows, self.cache.active_lengths, self.cache.extent, self.policy.dtype
            ),
            past_key_values=self.cache,
            use_cache=True,
            **({"decode_plan": self.plan} if self.plan else {}),
        )
        logits_BV = self._remember(0, output)
        self.cache.end_step()
        return logits_BV

    def _plan(self) -> None:
        """Note which active rows share a prefix that is read where it is."""
        groups: dict[int, list[int]] = {}
        for slot, row in enumerate(self.rows):
            if self.shares[row.request]:
                groups.setdefault(id(row.prefix), []).append(slot)
        device = self.last.device
        self.plan = DecodePlan(
            tuple(SharedPrefix(torch.tensor(s, device=device), self.rows[s[0]].prefix.layers) for s in groups.values())
        ) if groups else None

    def _remember(self, first: int, output: Tensor) -> Tensor:
        """Logits of what the last token of rows first.. says; its hidden state is noted if rollouts are kept."""
        if self.keep:
            if self.hidden is None:
                longest = max(request.max_new_tokens for request in self.requests)
                self.hidden = output.new_zeros(self.max_rows, longest, output.shape[1], dtype=self.policy.dtype)
            rows = torch.arange(first, first + len(output), device=output.device)
            # row i has drawn counts[i] tokens: 0 at its admission, when the prefix speaks
            drawn = torch.from_numpy(self.counts[first : first + len(output)]).to(output.device)
            self.hidden[rows, drawn] = output.to(self.hidden.dtype)
        return self.policy.logits(output)

    def _advance(self, first: int, logits_BV: Tensor) -> None:
        """Draw a token for rows first.., record it, and take out the rows that ended."""
        part = slice(first, first + len(logits_BV))
        draws = torch.from_numpy(uniforms(self.keys[part], self.counts[part])).to(logits_BV.device)
        tokens_B, logprobs_B = draw(logits_BV, draws, self.params)
        self.last[part] = tokens_B
        self.counts[part] += 1
        tokens, logprobs = tokens_B.cpu().numpy(), logprobs_B.cpu().numpy()
        if not np.isfinite(logprobs).all():
            raise EngineError(NOT_FINITE)
        is_eos = np.isin(tokens, self.eos)
        ended: list[int] = []
        for i, row in enumerate(self.rows[part]):
            row.tokens.append(int(tokens[i]))
            row.logprobs.append(float(logprobs[i]))
            stopped = bool(is_eos[i]) or (bool(self.params.stop) and self._hit_stop(row))
            if stopped or len(row.tokens) >= row.limit:
                self._finish(first + i, row, "stop" if stopped else "length")
                ended.append(first + i)
        if ended:
            self._remove(ended)

    def _hit_stop(self, row: _Row) -> bool:
        """Whether the newest token completes a stop string; it may have begun in the response before a pivot."""
        request = self.requests[row.request]
        before = request.prefix[request.response_start :] if request.response_start is not None else ()
        return completes_stop(self.policy.tokenizer, self.params.stop, before, row.tokens)

    def _finish(self, slot: int, row: _Row, reason: FinishReason) -> None:
        if self.keep and self.hidden is not None and len(row.tokens) > 1:
            fed = len(row.tokens) - 1  # the last token was never fed
            self.kept.put(
                self.requests[row.request].prefix, row.prefix, tuple(row.tokens[:-1]), self.cache.last_tokens(slot, fed),
                self.hidden[slot, : fed + 1],
            )  # fmt: skip
        completion = Completion(tuple(row.tokens), tuple(row.logprobs), reason)
        self.results[row.request][row.sibling] = completion

    def _remove(self, ended: list[int]) -> None:
        """Close the gaps: the last surviving rows move into the slots of rows that ended."""
        gone = set(ended)
        survivors = len(self.rows) - len(ended)
        holes = [slot for slot in ended if slot < survivors]
        movers = [slot for slot in range(survivors, len(self.rows)) if slot not in gone]
        if holes:
            source = torch.tensor(movers, device=self.last.device)
            target = torch.tensor(holes, device=self.last.device)
            self.cache.move(source, target)
            if self.hidden is not None:
                self.hidden[target] = self.hidden[source]
            self.last[target] = self.last[source]
            self.keys[holes], self.counts[holes] = self.keys[movers], self.counts[movers]
            for hole, mover in zip(holes, movers, strict=True):
                self.rows[hole] = self.rows[mover]
        del self.rows[survivors:]
        self._plan()
