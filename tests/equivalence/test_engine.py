"""The embedded engine against Hugging Face `generate`, against itself, and against the learner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn import random_requests
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from deepgrpo import rng
from deepgrpo.engines.base import SamplingParams
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.engines.embedded.sampler import draw, nucleus
from deepgrpo.errors import EngineError
from deepgrpo.model.policy import Policy
from deepgrpo.prompts import synthetic
from deepgrpo.records import SampleRequest

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def _policy(kind: str = "llama", seed: int = 0) -> Policy:
    tokenizer = synthetic.tokenizer()
    shape = {**SHAPE, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(seed)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    else:
        model = MistralForCausalLM(MistralConfig(**shape, sliding_window=8))
    with torch.no_grad():  # sharpen the distribution: near-ties would be decided by rounding
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
    return Policy(model.eval(), tokenizer, 128)


def _requests(policy: Policy, count: int = 6, siblings: int = 3, new: int = 20) -> list[SampleRequest]:
    return random_requests(policy, count, siblings, new, longer=4)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("max_rows", [2, 64])
def test_greedy_equals_generate(kind: str, max_rows: int) -> None:
    """Prompts of different lengths, fewer slots than rows, a sliding window of 8: the tokens of `generate`."""
    policy = _policy(kind)
    requests = [SampleRequest(r.prefix, r.keys[:1], r.max_new_tokens) for r in _requests(policy)]
    groups, _ = EmbeddedEngine(policy, max_rows=max_rows).sample(requests, SamplingParams(greedy=True))
    for request, (completion,) in zip(requests, groups, strict=True):
        ids = torch.tensor([request.prefix])
        expected = policy.model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0
        )
        assert list(completion.tokens) == expected[0, ids.shape[1] :].tolist()


def test_a_draw_does_not_depend_on_what_else_is_in_the_batch() -> None:
    policy = _policy()
    requests = _requests(policy)
    together, _ = EmbeddedEngine(policy, max_rows=64).sample(requests, SamplingParams())
    crowded, _ = EmbeddedEngine(policy, max_rows=3).sample(list(reversed(requests)), SamplingParams())
    single = EmbeddedEngine(policy, max_rows=1)
    alone = [
        [single.sample([SampleRequest(r.prefix, (k,), 20)], SamplingParams())[0][0][0] for k in r.keys] for r in requests
    ]
    tokens = [[c.tokens for c in group] for group in together]
    assert tokens == [[c.tokens for c in group] for group in reversed(crowded)]
    assert tokens == [[c.tokens for c in group] for group in alone]
    assert len({t for group in tokens for t in group}) > 10  # they do differ from each other


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_logprobs_are_those_of_the_learner(kind: str, temperature: float) -> None:
    policy = _policy(kind)
    requests = _requests(policy, count=3)
    groups, _ = EmbeddedEngine(policy).sample(requests, SamplingParams(temperature=temperature))
    for request, group in zip(requests, groups, strict=True):
        for completion in group:
            ids = torch.tensor([request.prefix + completion.tokens])
            first = len(request.prefix)
            rows = torch.arange(first - 1, first - 1 + len(completion.tokens))
            expected, _ = policy.logprobs(ids, rows, torch.tensor(completion.tokens), temperature=temperature)
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=2e-4)


def test_finish_reasons_and_limits() -> None:
    policy = _policy()
    groups, stats = EmbeddedEngine(policy).sample(_requests(policy, siblings=20), SamplingParams())
    eos = policy.tokenizer.eos_token_id
    seen = set()
    for completion in (c for group in groups for c in group):
        seen.add(completion.finish)
        assert len(completion.tokens) <= 20
        assert (completion.tokens[-1] == eos) == (completion.finish == "stop")
        assert eos not in completion.tokens[:-1]
        assert completion.finish == "stop" or len(completion.tokens) == 20
    assert seen == {"stop", "length"}
    assert stats.sampled_tokens == sum(len(c.tokens) for group in groups for c in group)


def test_a_prefix_is_encoded_once_for_all_siblings() -> None:
    policy = _policy()
    requests = _requests(policy, count=3, siblings=5)
    _, stats = EmbeddedEngine(policy, max_rows=4).sample([*requests, requests[0]], SamplingParams())
    lengths = [len(r.prefix) for r in requests]
    assert stats.prefix_tokens == 5 * (sum(lengths) + lengths[0])
    # the repeated request may come when its twin's prefix is gone: then it is encoded again, and billed
    assert sum(lengths) <= stats.prefix_tokens_encoded <= sum(lengths) + lengths[0]


def test_stop_strings_end_a_response_and_stay_in_it() -> None:
    policy = _policy()
    groups, _ = EmbeddedEngine(policy).sample(_requests(policy, siblings=10), SamplingParams(stop=("3",)))
    stopped = 0
    for completion in (c for group in groups for c in group):
        text = policy.tokenizer.decode(completion.tokens, skip_special_tokens=True)
        assert text.count("3") <= 1
        if "3" in text:
            assert text.endswith("3") and completion.finish == "stop"
            stopped += 1
    assert stopped > 5


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -50.0]]).expand(40_000, 4)
    keys = np.arange(40_000)
    uniforms = torch.from_numpy(rng.uniforms(keys, np.zeros_like(keys)))
    tokens, logprobs = draw(logits, uniforms, SamplingParams(temperature=2.0))
    expected = torch.softmax(torch.tensor([0.0, 0.5, 1.0, -25.0]), -1)
    counts = torch.bincount(tokens, minlength=4) / 40_000
    # three standard deviations of a share are at most .0075
    assert counts.tolist() == pytest.approx(expected.tolist(), abs=0.0075)
    assert logprobs[:50].tolist() == pytest.approx(expected.log()[tokens[:50]].tolist(), abs=1e-5)


def test_the_ends_of_the_unit_interval() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, 4)
    tokens, _ = draw(logits, torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64), SamplingParams())
    assert tokens.tolist() == [1, 2]  # never a token of probability zero


def test_nucleus_by_hand() -> None:
    probability = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    assert nucleus(probability, 0.5).tolist() == [[False, True, False, False]]
    assert nucleus(probability, 0.51).tolist() == [[False, True, False, True]]
    assert nucleus(probability, 1e-6).sum() == 1
    tokens, logprobs = draw(
        probability.log().expand(1000, 4), torch.linspace(0, 0.999, 1000, dtype=torch.float64), SamplingParams(top_p=0.7)
    )
    assert set(tokens.tolist()) == {1, 3}
    # renormalised: .5 / .75
    assert logprobs[tokens == 1][0].item() == pytest.approx(np.log(2 / 3), abs=1e-6)


def test_what_cannot_be_served_is_refused() -> None:
    policy = _policy()
    engine = EmbeddedEngine(policy)
    with pytest.raises(EngineError, match="context is 128"):
        engine.sample([SampleRequest((3,) * 100, (1,), 29)], SamplingParams())
    with pytest.raises(EngineError, match="no tokens"):
        engine.sample([SampleRequest((), (1,), 5)], SamplingParams())


def test_a_recurrent_model_is_sampled_by_its_own_generate() -> None:
    """Same keys, any batch: the same draws; a remark says what it costs."""
    from transformers import MambaConfig, MambaForCausalLM

    tokenizer = synthetic.tokenizer()
    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=1)
    )
    policy = Policy(model.eval(), tokenizer, 128)
    engine = EmbeddedEngine(policy, max_rows=64, keep_bytes=2**20)
    assert engine.remark is not None and "mamba has layers of type" in engine.remark
    requests = _requests(policy, count=3)
    groups, stats = engine.sample(requests, SamplingParams(), keep=True)
    assert stats.prefix_tokens_encoded == stats.prefix_tokens
    few, _ = EmbeddedEngine(policy, max_rows=2).sample(requests, SamplingParams())
    assert [[c.tokens for c in g] for g in few] == [[c.tokens for c in g] for g in groups]
    for request, group in zip(requests, groups, strict=True):
        for completion in group:
            ids, first = torch.tensor([request.prefix + completion.tokens]), len(request.prefix)
            rows = torch.arange(first - 1, first - 1 + len(completion.tokens))
            expected, _ = policy.logprobs(ids, rows, torch.tensor(completion.tokens), temperature=1.0)
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=2e-4)
    assert EmbeddedEngine(_policy()).remark is None


def test_sampling_leaves_the_training_mode_as_it_was() -> None:
    policy = _policy()
    policy.model.train()
    EmbeddedEngine(policy).sample(_requests(policy, 1), SamplingParams())
    assert policy.model.training


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_branches_of_a_kept_rollout_encode_nothing_and_draw_the_same(kind: str) -> None:
    """A branch from the kept keys equals a branch whose prefix is encoded afresh, at every offset of the rollout."""
    policy = _policy(kind)
    requests = _requests(policy, count=3, siblings=4)
    keeping = EmbeddedEngine(policy, max_rows=5, keep_bytes=2**24)
    groups, _ = keeping.sample(requests, SamplingParams(), keep=True)
    branches = [
        SampleRequest(r.prefix + c.tokens[:offset], (rng.key("b", i, offset), rng.key("c", i, offset)), 8)
        for r, group in zip(requests, groups, strict=True)
        for i, c in enumerate(group)
        for offset in range(len(c.tokens))
    ]
    quick, stats = keeping.sample(branches, SamplingParams())
    assert stats.prefix_tokens_encoded == 0 < stats.prefix_tokens
    slow, fresh = EmbeddedEngine(policy, max_rows=64).sample(branches, SamplingParams())
    assert fresh.prefix_tokens_encoded > 0
    for a, b in zip(quick, slow, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.tokens == y.tokens
            assert x.logprobs == pytest.approx(y.logprobs, abs=2e-4)
    keeping.forget()
    assert keeping.sample(branches, SamplingParams())[1].prefix_tokens_encoded >= fresh.prefix_tokens_encoded


def test_a_branch_from_the_very_end_of_a_rollout_is_encoded() -> None:
    """The last token of a rollout was drawn and never fed: the store has no keys for it."""
    policy = _policy()
    keeping = EmbeddedEngine(policy, keep_bytes=2**24)
    requests = _requests(policy, count=3, siblings=4)
    groups, _ = keeping.sample(requests, SamplingParams(), keep=True)
    ends = [
        SampleRequest(r.prefix + c.tokens, (rng.key("e", i),), 8)
        for r, group in zip(requests, groups, strict=True) for i, c in enumerate(group) if c.finish == "length"
    ]  # fmt: skip
    found, stats = keeping.sample(ends, SamplingParams())
    assert ends and stats.prefix_tokens_encoded == sum(len(r.prefix) for r in ends)
    expected, _ = EmbeddedEngine(policy).sample(ends, SamplingParams())
    assert [[c.tokens for c in g] for g in found] == [[c.tokens for c in g] for g in expected]


def test_beyond_its_memory_the_engine_encodes_again() -> None:
    policy = _policy()
    requests = _requests(policy, count=3, siblings=4)
    engine = EmbeddedEngine(policy, keep_bytes=20_000)
    groups, _ = engine.sample(requests, SamplingParams(), keep=True)
    assert 0 < engine.prefix_store.used <= 20_000
    branches = [
        SampleRequest(r.prefix + c.tokens[:1], (1,), 4)
        for r, group in zip(requests, groups, strict=True) for c in group if len(c.tokens) > 1
    ]  # fmt: skip
    _, stats = engine.sample(branches, SamplingParams())
    assert 0 < stats.prefix_tokens_encoded < stats.prefix_tokens


def test_a_stop_string_may_begin_before_the_pivot_and_may_be_a_special_token() -> None:
    policy = _policy()
    tokenizer = policy.tokenizer
    (first,) = tokenizer("3", add_special_tokens=False).input_ids
    prompt = tuple(tokenizer("1+2:", add_special_tokens=False).input_ids)
    engine = EmbeddedEngine(policy)
    keys = tuple(range(200))
    (free,), _ = engine.sample([SampleRequest((*prompt, first), keys, 6)], SamplingParams())
    second = next(c.tokens[0] for c in free if len(c.tokens) > 1)
    stop = (tokenizer.decode([first, second]),)
    response = SampleRequest((*prompt, first), keys, 6, response_start=len(prompt))
    (group,), _ = engine.sample([response], SamplingParams(stop=stop))
    began = [c for c in group if c.tokens[0] == second]
    assert began and all(c.tokens == (second,) and c.finish == "stop" for c in began)
    # in the prompt it does not count
    (group,), _ = engine.sample([SampleRequest((*prompt, first), keys, 6)], SamplingParams(stop=stop))
    assert any(len(c.tokens) > 1 for c in group if c.tokens[0] == second)
    special = tokenizer.convert_ids_to_tokens(tokenizer.pad_token_id)
    (group,), _ = engine.sample([SampleRequest(prompt, keys, 20)], SamplingParams(stop=(special,)))
    stopped = [c for c in group if tokenizer.pad_token_id in c.tokens]
    assert stopped and all(c.tokens[-1] == tokenizer.pad_token_id and c.finish == "stop" for c in stopped)


def test_without_sharing_every_request_encodes_its_prefix_and_draws_the_same() -> None:
    policy = _policy()
    apart = [SampleRequest(r.prefix, (k,), 10) for r in _requests(policy, count=3, siblings=4) for k in r.keys]
    merged, once = EmbeddedEngine(policy).sample(apart, SamplingParams())
    separate, each = EmbeddedEngine(policy, share_prefixes=False).sample(apart, SamplingParams())
    assert [[c.tokens for c in g] for g in merged] == [[c.tokens for c in g] for g in separate]
    assert each.prefix_tokens_encoded == each.prefix_tokens == 4 * once.prefix_tokens_encoded
