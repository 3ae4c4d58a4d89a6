"""The arithmetic around an engine, by hand: costs, limits, draws, what a store holds, who builds what."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from deepgrpo.config import EmbeddedEngineConfig, VLLMEngineConfig
from deepgrpo.engines import ENGINES, build_engine
from deepgrpo.engines.base import SampleStats, SamplingParams, check_requests
from deepgrpo.engines.embedded import decode
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.engines.embedded.masks import decoding_mask
from deepgrpo.engines.embedded.prefix_store import PrefixStore
from deepgrpo.engines.embedded.sampler import draw
from deepgrpo.engines.embedded.slots import Prefix, SlotCache
from deepgrpo.engines.stops import completes_stop, first_stop
from deepgrpo.errors import EngineError
from deepgrpo.records import SampleRequest


def test_costs_add_up_and_the_reused_share() -> None:
    first = SampleStats(sampled_tokens=5, prefix_tokens=40, prefix_tokens_encoded=10, seconds=1.5)
    assert first.reused == 0.75
    both = first + SampleStats(sampled_tokens=1, prefix_tokens=10, prefix_tokens_encoded=10, seconds=0.25)
    assert both == SampleStats(6, 50, 20, 1.75) and both.reused == pytest.approx(0.6)
    assert SampleStats().reused == 0.0


@pytest.mark.parametrize(
    ("prefix", "new", "refusal"),
    [(6, 4, None), (9, 1, None), (7, 4, "is 11, but .* context is 10"), (3, 0, "max_new_tokens is 0"), (0, 4, "no tokens")],
)
def test_limits_of_a_request(prefix: int, new: int, refusal: str | None) -> None:
    """A row may fill the context of 10 to its last token."""
    requests = [SampleRequest((3,) * prefix, (1,), new)]
    if refusal is None:
        check_requests(requests, 10)
    else:
        with pytest.raises(EngineError, match=refusal):
            check_requests(requests, 10)


def test_every_type_of_engine_has_an_entry_that_takes_its_section(policy: Any) -> None:
    types = {get_args(section.model_fields["type"].annotation)[0] for section in (EmbeddedEngineConfig, VLLMEngineConfig)}
    assert set(ENGINES) == types == {"embedded", "vllm"}
    engine = build_engine(EmbeddedEngineConfig(max_rows=7, keep_mb=3), policy, dtype="bfloat16", longest=20)
    assert isinstance(engine, EmbeddedEngine)
    assert (engine.max_rows, engine.prefix_store.budget, engine.weights.dtype) == (7, 3 * 2**20, torch.bfloat16)


def test_greedy_reports_the_log_prob_at_temperature_1() -> None:
    """p = (1/4, 3/4) at temperature 1; at temperature 1/2 it would be (1/10, 9/10)."""
    logits = torch.tensor([[1.0, 3.0]]).log()
    unused = torch.zeros(1, dtype=torch.float64)
    tokens, logprobs = draw(logits, unused, SamplingParams(temperature=0.5, greedy=True))
    assert tokens.tolist() == [1] and logprobs.exp().tolist() == pytest.approx([0.75])
    tokens, logprobs = draw(logits, unused, SamplingParams(temperature=0.5))
    assert tokens.tolist() == [0] and logprobs.exp().tolist() == pytest.approx([0.1])


def test_a_draw_on_a_boundary_takes_the_next_token() -> None:
    """p = (1/2, 1/2): u in [0, 1/2) is token 0, u in [1/2, 1) is token 1."""
    logits = torch.zeros(3, 2)
    draws = torch.tensor([0.5 - 2**-30, 0.5, 0.5 + 2**-30], dtype=torch.float64)
    assert draw(logits, draws, SamplingParams())[0].tolist() == [0, 1, 1]


def test_the_mask_of_a_decoding_step() -> None:
    """Rows with 0 and 3 tokens before the new one, 4 positions; a window of 2 leaves the new token and one before it."""
    lengths = torch.tensor([0, 3])
    mask = decoding_mask({"full_attention": None}, lengths, 4, torch.float32)
    assert (mask[:, 0, 0] == 0).tolist() == [[True, False, False, False], [True, True, True, True]]
    both = decoding_mask({"full_attention": None, "sliding_attention": 2}, lengths, 4, torch.float32)
    assert set(both) == {"full_attention", "sliding_attention"}
    assert (both["sliding_attention"][1, 0, 0] == 0).tolist() == [False, False, True, True]


def test_positions_count_an_attached_prefix() -> None:
    """Slot 0 has a copy of a prefix of 3 tokens, slot 1 has it attached: the next token is at position 3 in both."""
    prefix = Prefix([(torch.ones(1, 3, 2), torch.ones(1, 3, 2))], torch.zeros(4))
    cache = SlotCache(1, 2, 5, torch.device("cpu"), torch.float32)
    cache.fill(torch.tensor([0]), prefix)
    cache.attach(torch.tensor([1]), prefix)
    cache.begin_step(2)
    assert cache.active_lengths.tolist() == [3, 0] and cache.positions.tolist() == [3, 3] and cache.extent == 4
    cache.end_step()
    cache.begin_step(2)
    assert cache.active_lengths.tolist() == [4, 1] and cache.positions.tolist() == [4, 4]


def _stored(budget: int, rollouts: tuple[tuple[int, ...], ...]) -> PrefixStore:
    """A prompt (1, 2), whose keys are 0 and 1; the i-th sampled token of rollout r has key 10 r + i, hidden state 10 r + i."""
    store = PrefixStore(budget)

    def ramp(start: int, count: int, *shape: int) -> torch.Tensor:
        return torch.arange(start, start + count, dtype=torch.float32).view(*shape)

    prompt = Prefix([(ramp(0, 2, 1, 2, 1), ramp(0, 2, 1, 2, 1))], torch.zeros(1))
    for r, tokens in enumerate(rollouts, 1):
        n = len(tokens)
        layers = [(ramp(10 * r, n, 1, n, 1), ramp(10 * r, n, 1, n, 1))]
        store.put((1, 2), prompt, tokens, layers, ramp(10 * r, n + 1, n + 1, 1))
    return store


def test_a_stored_rollout_gives_the_prefix_up_to_any_of_its_tokens() -> None:
    store = _stored(1000, ((5, 6), (5, 7)))
    for wanted, keys, hidden in (
        ((1, 2), [0, 1], 10),  # the prompt's own last hidden state
        ((1, 2, 5), [0, 1, 10], 11),
        ((1, 2, 5, 6), [0, 1, 10, 11], 12),
        ((1, 2, 5, 7), [0, 1, 20, 21], 22),  # the last token decides which rollout it is
    ):
        found = store.find(wanted)
        assert found is not None and found.length == len(keys)
        assert found.layers[0][0].flatten().tolist() == keys and found.last.tolist() == [hidden]
    assert store.find((1, 2, 5, 8)) is None and store.find((1, 2, 5, 6, 5)) is None and store.find((1,)) is None
    store.clear()
    assert store.find((1, 2)) is None and store.used == 0


def test_the_budget_of_the_store_is_used_to_its_last_byte() -> None:
    """Prompt 2 x 2 x 4 = 16 bytes; a rollout of 2 tokens 2 x 2 x 4 of keys and values and 3 x 4 of hidden states, 28."""
    assert _stored(44, ((5, 6),)).used == 44
    assert _stored(43, ((5, 6),)).used == 0
    assert _stored(71, ((5, 6), (5, 7))).used == 44
    assert _stored(72, ((5, 6), (5, 7))).used == 72


def test_the_length_of_slots() -> None:
    requests = [SampleRequest((3,) * 300, tuple(range(8)), 20), SampleRequest((3,) * 30, (1,), 20)]
    assert decode.worth_attaching(requests) == [True, False]
    assert decode.slot_length(requests, [True, False]) == 50
    assert decode.slot_length(requests, [False, False]) == 320
    assert decode.slot_length([], []) == 1


class _Words:
    """Token t is the t-th word."""

    def decode(self, tokens: Any) -> str:
        return "".join(("a", "stop", " here, ", "b")[t] for t in tokens)


def test_stop_strings_of_several_tokens_and_tokens_of_several_characters() -> None:
    stop = ("stop here",)
    assert not completes_stop(_Words(), stop, (), (0, 1))
    assert completes_stop(_Words(), stop, (), (0, 1, 2))
    assert not completes_stop(_Words(), stop, (), (0, 1, 2, 3))  # it was complete before
    assert completes_stop(_Words(), stop, (1,), (2,))
    assert first_stop(_Words(), stop, (), (0, 1, 2, 3)) == 3
    assert first_stop(_Words(), stop, (), (0, 1, 2)) == 3
    assert first_stop(_Words(), stop, (1,), (2, 3)) == 1
    assert first_stop(_Words(), stop, (), (0, 1, 3, 2)) is None
