"""A shared prefix that is read where it is, and weights in bfloat16: the engine against itself and against plain attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from deepgrpo import rng
from deepgrpo.engines.base import SamplingParams
from deepgrpo.engines.embedded import decode
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.engines.embedded.sampler import BLOCK, draw
from deepgrpo.model.decode_attention import DecodePlan, SharedPrefix, decode_attention
from deepgrpo.model.policy import Policy
from deepgrpo.prompts import synthetic
from deepgrpo.records import SampleRequest

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None,
}  # fmt: skip


def _policy(window: int | None = None) -> Policy:
    tokenizer = synthetic.tokenizer()
    shape = {**SHAPE, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    if window:
        model: Any = MistralForCausalLM(MistralConfig(**shape, sliding_window=window))
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():  # sharpen the distribution: near-ties would be decided by rounding
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
    policy = Policy(model.eval(), tokenizer, 128)
    assert policy.try_tree_packing().packs
    return policy


def _requests(policy: Policy, lengths: tuple[int, ...] = (4, 17, 30), siblings: int = 5) -> list[SampleRequest]:
    random = np.random.default_rng(1)
    return [
        SampleRequest(
            tuple(int(t) for t in random.integers(2, len(policy.tokenizer), n)),
            tuple(rng.key(i, s) for s in range(siblings)), 20,
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip


@pytest.fixture
def always_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "ATTACH_COPIES", 1)
    monkeypatch.setattr(decode, "ATTACH_TOKENS", 10)  # so the request of 4 tokens gets copies: both kinds at once


@pytest.mark.parametrize("device_kernel", [True, False], ids=["flash", "portable"])
@examples(30)
@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=3), alone=st.integers(0, 2), prefix=st.integers(1, 9),
    extent=st.integers(1, 6), seed=st.integers(0, 2**31), ratio=st.sampled_from([1, 2, 3]),
)  # fmt: skip
def test_decode_attention_is_attention_over_both_parts(
    device_kernel: bool, counts: list[int], alone: int, prefix: int, extent: int, seed: int, ratio: int
) -> None:
    """Rows in any order, groups of any size, rows without a prefix: as if each row had its prefix before its slot."""
    generator = torch.Generator().manual_seed(seed)
    rows, groups, width = sum(counts) + alone, 2, 4
    if not rows:
        return
    # the kernel wants equal dimensions of K and V: with others the portable path is taken
    value_width = width if device_kernel else 3

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    order = torch.randperm(rows, generator=generator)
    query = random(rows, groups * ratio, 1, width)
    key, value = random(rows, 2, extent, width), random(rows, 2, extent, value_width)
    lengths = torch.randint(1, extent + 1, (rows,), generator=generator)
    hidden = torch.arange(extent)[None] >= lengths[:, None]
    mask = torch.zeros(rows, extent).masked_fill_(hidden, torch.finfo(torch.float32).min)[:, None, None]
    shared, owner = [], {}
    for count in counts:
        if count:
            members = order[len(owner) : len(owner) + count]
            shared.append(SharedPrefix(members, [(random(2, prefix, width), random(2, prefix, value_width))]))
            owner |= {int(row): shared[-1] for row in members}
    got = decode_attention(query, key, value, mask, DecodePlan(tuple(shared)), 0, 0.5)
    for row in range(rows):
        keys, values = key[row, :, : lengths[row]], value[row, :, : lengths[row]]
        if row in owner:
            before_keys, before_values = owner[row].layers[0]
            keys, values = torch.cat([before_keys, keys], 1), torch.cat([before_values, values], 1)
        for head in range(groups * ratio):
            weights = torch.softmax(0.5 * keys[head // ratio] @ query[row, head, 0], 0)
            assert got[row, head, 0].tolist() == pytest.approx((weights @ values[head // ratio]).tolist(), abs=1e-5)


@pytest.mark.usefixtures("always_shared")
@pytest.mark.parametrize("max_rows", [3, 64])
def test_a_prefix_that_is_read_where_it_is_gives_the_same_draws(max_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end and rows that move into their slots included; branches of kept rollouts too."""
    policy = _policy()
    requests = _requests(policy)
    calls = _count_plans(monkeypatch)
    shared = EmbeddedEngine(policy, max_rows=max_rows, keep_bytes=2**24)
    groups, _ = shared.sample(requests, SamplingParams(), keep=True)
    assert calls[0] > 0
    branches = [
        SampleRequest(r.prefix + c.tokens[:offset], tuple(rng.key("b", i, offset, k) for k in range(4)), 8)
        for r, group in zip(requests, groups, strict=True)
        for i, c in enumerate(group)
        for offset in range(0, len(c.tokens), 3)
    ]
    more, stats = shared.sample(branches, SamplingParams())
    assert stats.prefix_tokens_encoded == 0
    monkeypatch.setattr(decode, "ATTACH_TOKENS", 1000)
    seen = calls[0]
    copying = EmbeddedEngine(policy, max_rows=64)
    expected = copying.sample(requests, SamplingParams())[0] + copying.sample(branches, SamplingParams())[0]
    assert calls[0] == seen  # the control: nothing is shared now
    for got, wanted in zip(groups + more, expected, strict=True):
        for a, b in zip(got, wanted, strict=True):
            assert a.tokens == b.tokens
            assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4)


def _count_plans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls = [0]
    original = decode.DecodePlan

    def counted(groups: tuple[SharedPrefix, ...]) -> DecodePlan:
        calls[0] += 1
        return original(groups)

    monkeypatch.setattr(decode, "DecodePlan", counted)
    return calls


def test_short_prefixes_and_few_siblings_get_copies() -> None:
    """Reading a prefix where it is pays from 256 tokens, and 2,048 tokens of copies, on."""
    cases = {(255, 64): False, (256, 7): False, (256, 8): True, (1000, 2): False, (1000, 3): True}
    requests = [SampleRequest((3,) * length, tuple(range(count)), 1) for length, count in cases]
    assert decode.worth_attaching(requests) == list(cases.values())


@pytest.mark.usefixtures("always_shared")
def test_a_model_that_was_not_proved_gets_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = _policy()
    calls = _count_plans(monkeypatch)
    policy.causal.set_attn_implementation("sdpa")
    EmbeddedEngine(policy).sample(_requests(policy), SamplingParams())
    assert calls[0] == 0


@pytest.mark.parametrize("family", ["diffllama", "jetmoe", "deepseek_v2"])
def test_a_family_that_shares_wrongly_is_found_out(family: str) -> None:
    """Packed it is right, with copies of the prefix too; only reading a prefix where it is would be wrong."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    shapes: dict[str, dict[str, Any]] = {
        "diffllama": {"num_key_value_heads": 2},
        "jetmoe": {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        "deepseek_v2": {
            "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
            "topk_method": "greedy", "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
        },
    }  # fmt: skip
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**SHAPE, "vocab_size": 64, **shapes[family]})
    policy = Policy(AutoModelForCausalLM.from_config(config).eval(), synthetic.tokenizer(), 128)
    policy.try_tree_packing()
    engine = EmbeddedEngine(policy)
    assert engine.slot_objection is None and not engine.attaches_prefixes
    assert EmbeddedEngine(_policy()).attaches_prefixes


@pytest.mark.usefixtures("always_shared")
def test_a_window_forbids_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model passes the proof (its window holds the proof's paths), but rows leave their prefix behind as they grow."""
    policy = _policy(window=20)
    calls = _count_plans(monkeypatch)
    requests = [SampleRequest(r.prefix, r.keys[:4], 20) for r in _requests(policy)]
    groups, _ = EmbeddedEngine(policy).sample(requests, SamplingParams(greedy=True))
    assert calls[0] == 0
    for request, group in zip(requests, groups, strict=True):
        ids = torch.tensor([request.prefix])
        expected = policy.causal.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0
        )
        assert list(group[0].tokens) == expected[0, ids.shape[1] :].tolist()


@pytest.mark.usefixtures("always_shared")
def test_a_shared_prefix_takes_no_room_in_the_slots() -> None:
    policy = _policy()
    for lengths, expected in (((40, 50), 20), ((5, 50), 25)):  # the short one has a copy
        requests = _requests(policy, lengths)
        assert decode.slot_length(requests, decode.worth_attaching(requests)) == expected


def test_kept_rollouts_bill_their_prompt_once() -> None:
    policy = _policy()
    (request,) = _requests(policy, (30,), siblings=4)
    engine = EmbeddedEngine(policy, keep_bytes=2**24)
    (group,), _ = engine.sample([request], SamplingParams(), keep=True)
    per_token = 3 * 2 * 2 * 8 * 4  # layers, K and V, key heads, head dimension, bytes
    fed = [len(c.tokens) - 1 for c in group if len(c.tokens) > 1]
    hidden = sum(1 + n for n in fed) * 32 * 4
    assert engine.prefix_store.used == (30 + sum(fed)) * per_token + hidden


def test_bfloat16_weights_follow_the_policy_and_leave_it_alone() -> None:
    policy = _policy()
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    engine = EmbeddedEngine(policy, dtype=torch.bfloat16)
    assert not engine.exact
    requests = _requests(policy)
    first, _ = engine.sample(requests, SamplingParams())
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
    copied = engine.weights.current()
    assert {p.dtype for p in copied.model.parameters()} == {torch.bfloat16}
    # tied or not, a rotary frequency in bfloat16 would be wrong by up to 0.4%
    rotary = copied.causal.base_model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(0.5)
    second, _ = engine.sample(requests, SamplingParams())
    assert [c.tokens for g in first for c in g] != [c.tokens for g in second for c in g]
    fresh, _ = EmbeddedEngine(policy, dtype=torch.bfloat16).sample(requests, SamplingParams())
    assert [c.tokens for g in second for c in g] == [c.tokens for g in fresh for c in g]


def test_bfloat16_logprobs_are_near_those_of_float32() -> None:
    policy = _policy()
    requests = _requests(policy)
    groups, _ = EmbeddedEngine(policy, dtype=torch.bfloat16).sample(requests, SamplingParams())
    gaps = []
    for request, group in zip(requests, groups, strict=True):
        for c in group:
            ids, first = torch.tensor([request.prefix + c.tokens]), len(request.prefix)
            rows = torch.arange(first - 1, first - 1 + len(c.tokens))
            expected, _ = policy.logprobs(ids, rows, torch.tensor(c.tokens), temperature=1.0)
            gaps += (expected - torch.tensor(c.logprobs)).abs().tolist()
    # bfloat16 has 8 bits: log-probs of this sharpened model (logits up to 30) are off by tenths, not by units
    assert 1e-4 < float(np.mean(gaps)) < 0.2


def test_float32_sampling_of_a_bfloat16_learner_computes_in_float32() -> None:
    policy = _policy()
    requests = _requests(policy)
    expected, _ = EmbeddedEngine(policy).sample(requests, SamplingParams())
    policy.dtype = torch.bfloat16
    engine = EmbeddedEngine(policy, dtype=torch.float32)
    assert not engine.exact and not engine.weights.copied
    got, _ = engine.sample(requests, SamplingParams())
    assert got == expected and policy.dtype == torch.bfloat16


@pytest.mark.parametrize("vocabulary", [3, BLOCK, 5 * BLOCK + 7])
def test_inverse_cdf_by_blocks_finds_what_a_running_sum_finds(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(50, vocabulary, generator=generator)).double()
    logits[:, ::3] = -torch.inf
    logits[:, 1] = 0.0  # something is left even of three tokens
    uniforms = torch.rand(50, generator=generator, dtype=torch.float64)
    tokens, logprobs = draw(logits.float(), uniforms, SamplingParams())
    probability = torch.softmax(logits, -1)
    exact = torch.searchsorted(probability.cumsum(-1), uniforms[:, None], right=True).squeeze(1)
    assert (tokens == exact).float().mean() >= 0.98  # a uniform may lie within rounding of a boundary
    assert (probability[torch.arange(50), tokens] > 0).all()
    assert logprobs.tolist() == pytest.approx(probability[torch.arange(50), tokens].log().tolist(), abs=1e-4)


@pytest.mark.parametrize("end", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_unit_interval_with_many_blocks(end: float) -> None:
    """Rounding of a block's sum must never lead to a token of probability zero."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 10 * BLOCK, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.9] = -torch.inf
    tokens, logprobs = draw(logits, torch.full((200,), end, dtype=torch.float64), SamplingParams())
    assert torch.isfinite(logprobs).all()
    finite = torch.isfinite(logits)
    edge = finite.int().argmax(-1) if end == 0.0 else 10 * BLOCK - 1 - finite.flip(-1).int().argmax(-1)
    assert tokens.tolist() == edge.tolist()
