"""Sampling through the model's own `generate`, and the test that says who needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, LlamaModel

from deepgrpo import rng
from deepgrpo.engines.base import SamplingParams
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.engines.embedded.generate import GenerateMode, find_generate_mode, sample_with_generate
from deepgrpo.engines.embedded.slot_gate import slot_objection
from deepgrpo.engines.stops import completes_stop
from deepgrpo.errors import EngineError
from deepgrpo.model.policy import Policy
from deepgrpo.prompts import synthetic
from deepgrpo.records import Completion, SampleRequest

GREEDY = SamplingParams(greedy=True)
WINDOW = 16

COMMON = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
GQA = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
GPT_NEO = {**COMMON, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip

SLOTS: dict[str, dict[str, Any]] = {
    "llama": GQA,
    "qwen3": GQA,
    "mistral": {**GQA, "sliding_window": WINDOW},
    "gemma2": {**GQA, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "gpt2": GPT2,
    "opt": {**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
}
NO_SLOTS: dict[str, tuple[dict[str, Any], str]] = {
    # alibi is laid out by a mask of two dimensions
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, "raised an error when it was tried (ValueError: "),
    # its local layers count the window from the end of the longest row
    "gpt_neo": ({**GPT_NEO, "window_size": WINDOW}, "says something else when it decodes from slots"),
    "mamba": ({**COMMON, "state_size": 4}, "has layers of type linear_attention"),
    "mamba2": (
        {**COMMON, "state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2, "chunk_size": 8},
        "has layers of type linear_attention",
    ),
    "recurrent_gemma": (
        {**GQA, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
        "has layers of type linear_attention",
    ),
    "qwen3_next": ({**GQA, **LINEAR}, "has layers of type linear_attention"),
    "lfm2": ({**GQA, "layer_types": ["conv", "full_attention"]}, "has layers of type conv"),
    "rwkv": ({**COMMON, "attention_hidden_size": 32}, "fills 0 of its 2 layers when given an empty cache"),
}


def _policy(family: str = "llama", shape: dict[str, Any] | None = None) -> Policy:
    tokenizer = synthetic.tokenizer()
    names = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[family](**(shape or SLOTS[family]), **names, bos_token_id=None)
    )
    model.requires_grad_(False)
    for parameter in model.parameters():  # sharpen the distribution: near-ties would be decided by rounding
        if parameter.ndim == 2:
            parameter.mul_(5.0)
    return Policy(model.eval(), tokenizer, 128)


def _requests(
    policy: Policy, lengths: Sequence[int] = (9, 4, 30, 9), siblings: int = 1, new: int = 12
) -> list[SampleRequest]:
    generator = torch.Generator().manual_seed(1)
    return [
        SampleRequest(
            tuple(torch.randint(2, len(policy.tokenizer), (n,), generator=generator).tolist()),
            tuple(rng.key(0, i, s) for s in range(siblings)), new,
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip


def _same(got: list[list[Completion]], expected: list[list[Completion]]) -> None:
    assert [[(c.tokens, c.finish) for c in group] for group in got] == [
        [(c.tokens, c.finish) for c in group] for group in expected
    ]
    for a, b in zip(got, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.logprobs == pytest.approx(y.logprobs, abs=2e-4)


@torch.no_grad()
def _most_likely(policy: Policy, request: SampleRequest) -> tuple[int, ...]:
    """Greedy tokens of one row by forward passes over all of it: no cache, no batch."""
    tokens: list[int] = []
    while len(tokens) < request.max_new_tokens and policy.tokenizer.eos_token_id not in tokens:
        logits = policy.causal(input_ids=torch.tensor([[*request.prefix, *tokens]]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tuple(tokens)


@pytest.mark.parametrize("family", SLOTS)
def test_families_that_slots_serve_are_served_right(family: str) -> None:
    """Rows of unequal length, also beyond a window of 16."""
    policy = _policy(family)
    assert slot_objection(policy) is None
    requests = _requests(policy)
    groups, _ = EmbeddedEngine(policy).sample(requests, GREEDY)
    assert [c.tokens for (c,) in groups] == [_most_likely(policy, r) for r in requests]


@pytest.mark.parametrize("family", NO_SLOTS)
def test_other_families_are_refused_and_served_by_generate(family: str) -> None:
    shape, reason = NO_SLOTS[family]
    policy = _policy(family, shape)
    found = slot_objection(policy)
    assert found is not None and found.startswith(reason)
    requests = _requests(policy)
    groups, encoded = sample_with_generate(policy, requests, GREEDY, 64, mode=find_generate_mode(policy))
    assert [c.tokens for (c,) in groups] == [_most_likely(policy, r) for r in requests]
    assert encoded == 4 + 9 + 9 + 30


def test_the_probe_reaches_beyond_a_window_that_the_config_hides() -> None:
    """GPT-Neo alone knows what its window_size means, and short rows do not show that it counts it wrongly."""
    assert slot_objection(_policy("gpt_neo", {**GPT_NEO, "window_size": 100})) is not None
    assert slot_objection(_policy("gpt_neo", {**GPT_NEO, "window_size": 2000})) is None  # longer than any row


def test_a_model_that_looks_ahead_is_neither_served_nor_sampled() -> None:
    policy = _policy("bert", COMMON)  # without is_decoder every token sees the whole row
    assert slot_objection(policy) is not None
    with pytest.raises(EngineError, match=r"'bert'.*log-probs differ.*is_decoder = true"):
        find_generate_mode(policy)


def test_the_way_of_generate_is_the_quickest_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """RWKV mixes the rows of a batch when it decodes; a forward that drops its cache must encode everything again."""
    assert find_generate_mode(_policy()) == GenerateMode()
    assert find_generate_mode(_policy("rwkv", NO_SLOTS["rwkv"][0])) == GenerateMode(batched=False)
    policy, forward = _policy(), LlamaModel.forward

    def forgetful(self: Any, input_ids: Any = None, **_: Any) -> Any:
        return forward(self, input_ids, use_cache=False)

    monkeypatch.setattr(LlamaModel, "forward", forgetful)
    assert find_generate_mode(policy) == GenerateMode(use_cache=False)
    assert slot_objection(policy) == "fills 0 of its 2 layers when given an empty cache"


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0.7, top_p=0.9), SamplingParams(stop=("3", "+2"))], ids=str
)
@pytest.mark.parametrize("max_rows", [2, 64])
def test_draws_are_those_of_the_slots(params: SamplingParams, max_rows: int) -> None:
    """Unequal and equal prefix lengths, siblings, more rows than fit, EOS and stop strings on the way: token for token."""
    policy = _policy()
    requests = _requests(policy, siblings=6, new=20)
    expected, _ = EmbeddedEngine(policy).sample(requests, params)
    got, encoded = sample_with_generate(policy, requests, params, max_rows)
    _same(got, expected)
    assert {c.finish for group in got for c in group} == {"stop", "length"}
    assert encoded == 6 * (4 + 9 + 9 + 30)


@pytest.mark.parametrize("mode", [GenerateMode(batched=False), GenerateMode(use_cache=False)], ids=str)
def test_every_way_draws_the_same(mode: GenerateMode) -> None:
    policy = _policy()
    requests = _requests(policy, siblings=2)
    expected, _ = sample_with_generate(policy, requests, SamplingParams(), 64)
    _same(sample_with_generate(policy, requests, SamplingParams(), 64, mode=mode)[0], expected)


def test_each_row_has_its_own_limit_and_nothing_follows_its_end() -> None:
    policy = _policy()
    one = _requests(policy, lengths=(9,), siblings=8, new=20)[0]
    requests = [SampleRequest(one.prefix, one.keys, limit) for limit in (20, 1, 7)]
    (free, single, short), _ = sample_with_generate(policy, requests, SamplingParams(), 64)
    eos = policy.tokenizer.eos_token_id
    for group, limit in ((free, 20), (single, 1), (short, 7)):
        for long, completion in zip(free, group, strict=True):
            assert completion.tokens == long.tokens[:limit]
            assert len(completion.logprobs) == len(completion.tokens)
            assert eos not in completion.tokens[:-1]
            assert completion.finish == ("stop" if completion.tokens[-1] == eos else "length")
    assert {len(c.tokens) for c in free} > {20}  # some end early


def test_a_stop_string_may_begin_before_the_prefix_ends() -> None:
    tokenizer = synthetic.tokenizer()
    plus, two, three = (tokenizer(text, add_special_tokens=False).input_ids[0] for text in "+23")
    assert completes_stop(tokenizer, ("+2",), (plus,), (two,))
    assert not completes_stop(tokenizer, ("+2",), (), (two,))
    assert not completes_stop(tokenizer, ("+2",), (plus, two), (three,))  # an old one does not count again
    assert completes_stop(tokenizer, ("+2", "3"), (), (two, three))
    assert not completes_stop(tokenizer, (), (), (two,))
    policy = _policy()
    prefix = (*_requests(policy)[0].prefix, plus)
    for start, expected in ((len(prefix) - 1, "stop"), (None, "length")):
        request = SampleRequest(prefix, tuple(range(100)), 2, response_start=start)
        (group,), _ = sample_with_generate(policy, [request], SamplingParams(temperature=2.0, stop=("+2",)), 100)
        began = [c for c in group if c.tokens[0] == two and c.tokens[-1] not in policy.eos_ids]
        assert began and all(c.finish == expected for c in began)


def test_the_generation_config_of_the_model_does_not_interfere() -> None:
    policy = _policy()
    requests = _requests(policy, siblings=4)
    plain, _ = sample_with_generate(policy, requests, SamplingParams(), 64)
    own = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=2, repetition_penalty=3.0, no_repeat_ngram_size=1, suppress_tokens=[3, 4, 5],
        min_new_tokens=12, forced_eos_token_id=6, eos_token_id=policy.tokenizer.eos_token_id, num_beams=2,
        pad_token_id=5, max_length=20,
    )  # fmt: skip
    policy.causal.generation_config = own
    configured, _ = sample_with_generate(policy, requests, SamplingParams(), 64)
    assert configured == plain
    assert policy.causal.generation_config is own


def test_a_token_with_the_id_of_the_padding_is_a_token() -> None:
    policy = _policy()
    assert policy.causal.config.pad_token_id == 0
    request = SampleRequest((0, 5, 0, 0, 7, 0), (3, 4, 5), 8)
    expected, _ = EmbeddedEngine(policy).sample([request], SamplingParams())
    _same(sample_with_generate(policy, [request], SamplingParams(), 64)[0], expected)


def test_logits_that_are_not_finite_are_an_error() -> None:
    policy = _policy()
    own = policy.causal.generation_config
    policy.causal.lm_head.weight.fill_(torch.nan)
    with pytest.raises(EngineError, match=r"not finite.*optim\.lr"):
        sample_with_generate(policy, _requests(policy), SamplingParams(), 64)
    assert policy.causal.generation_config is own


def test_a_model_without_generate_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = _policy()
    monkeypatch.delattr("transformers.generation.GenerationMixin.generate")
    with pytest.raises(EngineError, match="neither from slots nor by a `generate`"):
        sample_with_generate(policy, _requests(policy), SamplingParams(), 64)


def test_the_training_mode_stays_as_it_was() -> None:
    policy = _policy()
    policy.model.train()
    slot_objection(policy)
    find_generate_mode(policy)
    assert policy.model.training
