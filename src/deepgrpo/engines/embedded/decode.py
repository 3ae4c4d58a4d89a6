"""The decoding loop of one `sample` call.

Admit waiting rows into free slots (a prefix is encoded once for all its siblings), run one step for all active rows, draw,
remove the rows that ended, move the last rows into their slots. A row's draw depends on its prefix, its key and the
weights; its neighbours affect only the rounding.

A row normally holds a copy of its prefix in its slot. If many siblings have a long prefix, the prefix is attached instead:
all of them read the one encoded copy (`model/decode_attention.py`), which raises arithmetic intensity and stores it once.

Shapes: B active rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from deepgrpo.engines.base import SamplingParams, not_finite
from deepgrpo.engines.embedded.masks import decoding_mask, windows_of
from deepgrpo.engines.embedded.prefill import encode_behind, encode_prefixes
from deepgrpo.engines.embedded.prefix_store import Origin, PrefixStore, joined
from deepgrpo.engines.embedded.sampler import draw
from deepgrpo.engines.embedded.slots import Prefix, SlotCache
from deepgrpo.engines.stops import completes_stop
from deepgrpo.model.decode_attention import DecodePlan, SharedPrefix
from deepgrpo.model.policy import Policy
from deepgrpo.model.shape import shape_of
from deepgrpo.progress import phase
from deepgrpo.records import Completion, FinishReason, SampleRequest
from deepgrpo.rng import uniforms

ATTACH_TOKENS, ATTACH_COPIES = 256, 2048
"""A prefix is attached if it has at least ATTACH_TOKENS tokens and its copies for all siblings would hold at least
ATTACH_COPIES. Measured on two CPU cores: 8 siblings decode 1.1 times as fast behind 320 tokens, twice as fast behind 2,048;
shorter prefixes are slower."""


def worth_attaching(requests: Sequence[SampleRequest]) -> list[bool]:
    """Decide for each request whether its prefix is attached rather than copied.

    The decision depends on the request alone, so that a row's arithmetic does not depend on the rest of the batch.
    """
    return [len(r.prefix) >= ATTACH_TOKENS and len(r.prefix) * len(r.keys) >= ATTACH_COPIES for r in requests]


def slot_length(requests: Sequence[SampleRequest], attached: Sequence[bool]) -> int:
    """Tokens that a slot must hold: new ones, and the prefix unless it is attached."""
    lengths = (r.max_new_tokens + (0 if apart else len(r.prefix)) for r, apart in zip(requests, attached, strict=True))
    return max(lengths, default=1)


@dataclass
class _Row:
    """A continuation that is being sampled."""

    request: int
    sibling: int
    limit: int
    prefix: Prefix
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class SampleCall:
    """State of one `sample` call.

    Args:
        policy: the policy with the engine's weights, in evaluation mode.
        requests, params, keep: as in `engines.base.Engine.sample`, already checked.
        max_rows: sequences decoded at once.
        store: rollouts of earlier calls, and those that `keep` adds.
        attach: allow prefixes to be read in place.
        extend: encode only the rest of a prefix whose beginning is stored.
        share_prefixes: encode equal prefixes once.
    """

    def __init__(
        self, policy: Policy, requests: Sequence[SampleRequest], params: SamplingParams, *, max_rows: int,
        store: PrefixStore, keep: bool, attach: bool, extend: bool = False, share_prefixes: bool = True,
    ) -> None:  # fmt: skip
        self.policy, self.requests, self.params = policy, requests, params
        self.share_prefixes, self.extend = share_prefixes, extend
        self.waiting = deque((r, s) for r, request in enumerate(requests) for s in range(len(request.keys)))
        self.rows: list[_Row] = []
        self.max_rows = min(max_rows, max(1, len(self.waiting)))
        self.prefixes: dict[int, Prefix] = {}
        """Encoded prefixes by request, while rows of the request are waiting."""
        self.left = [len(request.keys) for request in requests]
        """Waiting rows of each request."""
        self.results: list[list[Completion | None]] = [[None] * len(request.keys) for request in requests]
        self.encoded_tokens = 0
        device = policy.device
        self.windows = windows_of(policy)
        self.attached = worth_attaching(requests) if attach else [False] * len(requests)
        self.cache = SlotCache(
            shape_of(policy.causal.config).layers, self.max_rows, slot_length(requests, self.attached), device,
            policy.dtype,
        )  # fmt: skip
        self.plan: DecodePlan | None = None
        """Attached prefixes of the active rows."""
        self.last = torch.zeros(self.max_rows, dtype=torch.long, device=device)
        """Newest token of each active row."""
        self.keys = np.zeros(self.max_rows, dtype=np.uint64)
        self.counts = np.zeros(self.max_rows, dtype=np.int64)
        """Tokens drawn by each active row."""
        self.drawn = 0
        """Tokens drawn by all rows."""
        self.eos = np.array(policy.eos_ids)
        self.store = store
        # storing logits instead of hidden states would take too much memory
        self.keep = keep and store.budget > 0 and policy.plain_head
        self.hidden: Tensor | None = None
        """`[rows, new tokens, H]` last hidden states from the end of the prefix on, if rollouts are stored."""

        self.seen: Tensor | None = None
        """`[rows, V]` tokens that occur in each active row, with a repetition penalty."""

    @property
    def completions(self) -> list[list[Completion]]:
        return [[c for c in group if c is not None] for group in self.results]

    def run(self) -> None:
        with phase("sampling", left := len(self.waiting)) as advance:
            while self.waiting or self.rows:
                self._admit()
                if self.rows:
                    self._advance(0, self._step())
                before, left = left, len(self.waiting) + len(self.rows)
                advance(before - left, f"{self.drawn:,} tokens")

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
                begin = self.cache.attach if self.attached[r] else self.cache.fill
                begin(torch.tensor(slots, device=self.last.device), self.prefixes[r])
                self.left[r] -= len(slots)
                if not self.left[r]:
                    del self.prefixes[r]  # from here on only its rows need it
            self._plan()
            self._advance(first, self._record(first, torch.stack(output)))

    def _encode(self, wanted: list[int]) -> None:
        """Encode each distinct prefix that is not in the store."""
        same: dict[tuple[tuple[int, ...], int], list[int]] = {}
        begun: dict[int, Origin] = {}
        for r in wanted:
            tokens, known = self.requests[r].prefix, self.requests[r].known
            if (stored := self.store.find(tokens)) is not None:
                self.prefixes[r] = stored
            elif self.extend and known and (origin := self.store.extend(tokens, known)) is not None:
                begun[r] = origin
            else:
                same.setdefault((tokens, 0 if self.share_prefixes else r), []).append(r)
        self._go_on(begun)
        encoded = encode_prefixes(self.policy, [tokens for tokens, _ in same])
        for requests, prefix in zip(same.values(), encoded, strict=True):
            for r in requests:
                self.prefixes[r] = Prefix(prefix.layers, prefix.last)
        self.encoded_tokens += sum(prefix.length for prefix in encoded)

    def _go_on(self, begun: dict[int, Origin]) -> None:
        """Encode what follows the stored beginning of each of these requests' prefixes."""
        layers = [origin.layers for origin in begun.values()]
        rests = [self.requests[r].prefix[before[0][0].shape[1] :] for r, before in zip(begun, layers, strict=True)]
        encoded = encode_behind(self.policy, layers, rests)
        for (r, origin), before, (rest, last) in zip(begun.items(), layers, encoded, strict=True):
            self.prefixes[r] = Prefix(joined(before, rest), last, origin, rest)
        self.encoded_tokens += sum(map(len, rests))

    def _step(self) -> Tensor:
        """Feed every active row its newest token. Returns logits `[B, V]`."""
        active = len(self.rows)
        self.cache.begin_step(active)
        output = self.policy.run(
            self.cache.rows,
            input_ids=self.last[:active, None],
            position_ids=self.cache.positions[:, None],
            attention_mask=decoding_mask(self.windows, self.cache.active_lengths, self.cache.extent, self.policy.dtype),
            past_key_values=self.cache,
            use_cache=True,
            **({"decode_plan": self.plan} if self.plan else {}),
        )
        logits_BV = self._record(0, output)
        self.cache.end_step()
        return logits_BV

    def _plan(self) -> None:
        """Group the active rows by attached prefix."""
        groups: dict[int, list[int]] = {}
        for slot, row in enumerate(self.rows):
            if self.attached[row.request]:
                groups.setdefault(id(row.prefix), []).append(slot)
        device = self.last.device
        self.plan = DecodePlan(
            tuple(SharedPrefix(torch.tensor(s, device=device), self.rows[s[0]].prefix.layers) for s in groups.values())
        ) if groups else None

    def _record(self, first: int, output: Tensor) -> Tensor:
        """Logits of the model's output for rows first..; their hidden states are recorded if rollouts are stored."""
        if self.keep:
            if self.hidden is None:
                longest = max(request.max_new_tokens for request in self.requests)
                self.hidden = output.new_zeros(self.max_rows, longest, output.shape[1], dtype=self.policy.dtype)
            rows = torch.arange(first, first + len(output), device=output.device)
            # row i has drawn counts[i] tokens: 0 at its admission, when the output is that of its prefix
            drawn = torch.from_numpy(self.counts[first : first + len(output)]).to(output.device)
            self.hidden[rows, drawn] = output.to(self.hidden.dtype)
        return self.policy.logits(output)

    def _advance(self, first: int, logits_BV: Tensor) -> None:
        """Draw a token for rows first.., append it, and remove the rows that ended."""
        part = slice(first, first + len(logits_BV))
        draws = torch.from_numpy(uniforms(self.keys[part], self.counts[part]))
        seen_BV = self._seen(part, logits_BV) if self.params.repetition_penalty != 1.0 else None
        tokens_B, logprobs_B = draw(logits_BV, draws, self.params, seen_BV)
        if seen_BV is not None:
            seen_BV.scatter_(1, tokens_B[:, None], True)
        self.last[part] = tokens_B
        self.counts[part] += 1
        self.drawn += len(tokens_B)
        tokens, logprobs = tokens_B.cpu().numpy(), logprobs_B.cpu().numpy()
        finite = np.isfinite(logprobs)
        if not finite.all():
            row = self.rows[first + int(finite.argmin())]
            raise not_finite(self.policy.tokenizer, self.requests[row.request], len(row.tokens))
        is_eos = np.isin(tokens, self.eos)
        ended: list[int] = []
        for i, row in enumerate(self.rows[part]):
            row.tokens.append(int(tokens[i]))
            row.logprobs.append(float(logprobs[i]))
            stopped = bool(is_eos[i])
            if self.params.stop and not stopped:  # a stop string may begin in the response before a pivot
                before = self.requests[row.request].response
                stopped = completes_stop(self.policy.tokenizer, self.params.stop, before, row.tokens)
            if stopped or len(row.tokens) >= row.limit:
                self._finish(first + i, row, "stop" if stopped else "length")
                ended.append(first + i)
        if ended:
            self._remove(ended)

    def _seen(self, part: slice, logits_BV: Tensor) -> Tensor:
        """Tokens that occur in each of these rows, `[B, V]`: a view into `self.seen`."""
        if self.seen is None:
            self.seen = torch.zeros(self.max_rows, logits_BV.shape[1], dtype=torch.bool, device=logits_BV.device)
        for slot in range(part.start, part.stop):
            if not self.counts[slot]:  # new in its slot
                self.seen[slot] = False
                self.seen[slot, torch.tensor(self.requests[self.rows[slot].request].prefix, device=self.seen.device)] = True
        return self.seen[part]

    def _finish(self, slot: int, row: _Row, reason: FinishReason) -> None:
        request = self.requests[row.request]
        if self.keep and self.hidden is not None and (len(row.tokens) > 1 or request.known is not None):
            fed = len(row.tokens) - 1  # the last token was never fed
            nothing = [(keys[:, :0], values[:, :0]) for keys, values in row.prefix.layers]
            self.store.put(
                request.prefix, row.prefix, tuple(row.tokens[:-1]), self.cache.last_tokens(slot, fed) if fed else nothing,
                self.hidden[slot, : fed + 1],
            )  # fmt: skip
        self.results[row.request][row.sibling] = Completion(tuple(row.tokens), tuple(row.logprobs), reason)

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
            if self.seen is not None:
                self.seen[target] = self.seen[source]
            self.last[target] = self.last[source]
            self.keys[holes], self.counts[holes] = self.keys[movers], self.counts[movers]
            for hole, mover in zip(holes, movers, strict=True):
                self.rows[hole] = self.rows[mover]
        del self.rows[survivors:]
        self._plan()
