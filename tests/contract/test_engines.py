"""What every engine must do. The vLLM engine is asked where vLLM is importable; both are asked about the same policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from drawn import processors_of, random_requests
from transformers import LlamaConfig, LlamaForCausalLM
from vllm_here import needs_vllm, vllm_engine

from deepgrpo import rng
from deepgrpo.engines.base import Engine, SamplingParams
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.engines.embedded.generate import sample_with_generate
from deepgrpo.engines.embedded.sampler import nucleus
from deepgrpo.errors import EngineError
from deepgrpo.model.policy import Policy
from deepgrpo.prompts import synthetic
from deepgrpo.records import Completion, SampleRequest

CONTEXT = 256


def _policy() -> Policy:
    tokenizer = synthetic.tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=CONTEXT, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    with torch.no_grad():  # sharpen the distribution: near-ties would be decided by rounding
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0)
    return Policy(model.eval(), tokenizer, CONTEXT)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return _policy()


@pytest.fixture(scope="module", params=["embedded", pytest.param("vllm", marks=needs_vllm)])
def engine(request: Any, policy: Policy) -> Iterator[Engine]:
    made: Engine
    if request.param == "embedded":
        made = EmbeddedEngine(policy, keep_bytes=2**24)
    else:
        made = vllm_engine(policy)
    yield made
    made.close()
    made.close()  # twice does no harm


def _requests(policy: Policy, count: int = 5, siblings: int = 3, new: int = 20) -> list[SampleRequest]:
    return random_requests(policy, count, siblings, new, longer=9)


def _tokens(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[c.tokens for c in group] for group in groups]


def _learner_logprobs(policy: Policy, prefix: tuple[int, ...], c: Completion, temperature: float, top_p: float) -> Any:
    ids = torch.tensor([prefix + c.tokens])
    with torch.no_grad():
        logits = policy.causal(ids).logits[0, len(prefix) - 1 : -1] / temperature
    probability = torch.softmax(logits.float(), -1)
    if top_p < 1:
        probability = probability * nucleus(probability, top_p)
        probability = probability / probability.sum(-1, keepdim=True)
    return probability.gather(1, torch.tensor(c.tokens)[:, None]).squeeze(1).log()


def _generated(policy: Policy, request: SampleRequest) -> list[int]:
    ids = torch.tensor([request.prefix])
    whole = policy.model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=request.max_new_tokens, pad_token_id=0
    )
    found: list[int] = whole[0, ids.shape[1] :].tolist()
    return found


def test_greedy_equals_generate(engine: Engine, policy: Policy) -> None:
    requests = [SampleRequest(r.prefix, r.keys[:1], r.max_new_tokens) for r in _requests(policy)]
    groups, _ = engine.sample(requests, SamplingParams(greedy=True))
    for request, (completion,) in zip(requests, groups, strict=True):
        assert list(completion.tokens) == _generated(policy, request)
        expected = _learner_logprobs(policy, request.prefix, completion, 1.0, 1.0)
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=2e-4)


def test_a_draw_depends_on_prefix_key_and_weights_alone(engine: Engine, policy: Policy) -> None:
    """Together, the other way round, and one by one."""
    requests = _requests(policy)
    together, _ = engine.sample(requests, SamplingParams())
    reversed_, _ = engine.sample(list(reversed(requests)), SamplingParams())
    alone = [[engine.sample([SampleRequest(r.prefix, (k,), 20)], SamplingParams())[0][0][0] for k in r.keys] for r in requests]
    assert _tokens(together) == list(reversed(_tokens(reversed_))) == _tokens(alone)
    assert len({t for group in _tokens(together) for t in group}) > 10  # they do differ from each other


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_logprobs_are_those_of_what_was_sampled_from(
    engine: Engine, policy: Policy, temperature: float, top_p: float
) -> None:
    requests = _requests(policy, count=3)
    groups, _ = engine.sample(requests, SamplingParams(temperature=temperature, top_p=top_p))
    for request, group in zip(requests, groups, strict=True):
        for completion in group:
            expected = _learner_logprobs(policy, request.prefix, completion, temperature, top_p)
            assert torch.isfinite(expected).all()  # never a token outside the nucleus
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=5e-4)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=4), SamplingParams(min_p=0.2, temperature=1.3), SamplingParams(repetition_penalty=1.7),
        SamplingParams(repetition_penalty=0.8, temperature=0.8, top_k=6, top_p=0.9),
    ],
    ids=["top-k", "min-p", "penalty", "all"],
)  # fmt: skip
def test_logprobs_are_those_of_transformers(engine: Engine, policy: Policy, params: SamplingParams) -> None:
    """Step by step, by the processors of `generate`, on prefixes that end in a part of a response as those of branches do."""
    requests = [replace(r, response_start=len(r.prefix) // 2) for r in _requests(policy, count=3, new=8)]
    groups, _ = engine.sample(requests, params)
    processors = processors_of(params)
    for request, group in zip(requests, groups, strict=True):
        for completion in group:
            ids = torch.tensor([request.prefix + completion.tokens])
            with torch.no_grad():
                logits = policy.causal(ids).logits[0].float()
            for i, token in enumerate(completion.tokens):
                at = len(request.prefix) + i
                scores = processors(ids[:, :at], logits[at - 1 : at].clone())
                expected = torch.log_softmax(scores, -1)[0, token]
                assert completion.logprobs[i] == pytest.approx(float(expected), abs=5e-4)


def test_a_penalty_knows_the_tokens_of_each_row(policy: Policy) -> None:
    """Rows that change their slots, as others end, keep their own tokens; the fallback by `generate` draws the same."""
    params = SamplingParams(repetition_penalty=1.9, top_k=9, stop=("7",))
    requests = _requests(policy, count=4, siblings=3)
    few, many = EmbeddedEngine(policy, max_rows=3), EmbeddedEngine(policy, max_rows=64)
    crowded, _ = few.sample(requests, params)
    assert len({len(c.tokens) for group in crowded for c in group}) > 2  # they do end at different times
    assert _tokens(crowded) == _tokens(many.sample(requests, params)[0])
    assert _tokens(crowded) == _tokens(sample_with_generate(policy, requests, params, 64)[0])


def test_first_tokens_follow_the_distribution(engine: Engine, policy: Policy) -> None:
    prefix, count, params = _requests(policy)[1].prefix, 1500, SamplingParams(temperature=2.0, top_p=0.95)
    (group,), _ = engine.sample([SampleRequest(prefix, tuple(rng.key("d", i) for i in range(count)), 1)], params)
    drawn = torch.bincount(torch.tensor([c.tokens[0] for c in group]), minlength=len(policy.tokenizer)) / count
    with torch.no_grad():
        probability = torch.softmax(policy.causal(torch.tensor([prefix])).logits[0, -1] / 2.0, -1)[None]
    expected = (probability * nucleus(probability, 0.95))[0]
    expected = expected / expected.sum()
    # five standard deviations of a share: sqrt(.25 / 1500) is .013
    assert (drawn - expected).abs().max() < 5 * float((expected * (1 - expected) / count).sqrt().max())
    assert int((expected > 0.01).sum()) >= 4  # it is a distribution worth the name


def test_finish_reasons_and_limits(engine: Engine, policy: Policy) -> None:
    groups, stats = engine.sample(_requests(policy, siblings=20), SamplingParams())
    eos = policy.tokenizer.eos_token_id
    seen = set()
    for completion in (c for group in groups for c in group):
        seen.add(completion.finish)
        assert len(completion.tokens) == len(completion.logprobs) <= 20
        assert (completion.tokens[-1] == eos) == (completion.finish == "stop")
        assert eos not in completion.tokens[:-1]
        assert completion.finish == "stop" or len(completion.tokens) == 20
    assert seen == {"stop", "length"}
    assert stats.sampled_tokens == sum(len(c.tokens) for group in groups for c in group)


def test_limits_are_of_each_request(engine: Engine, policy: Policy) -> None:
    requests = [SampleRequest(r.prefix, r.keys, 1 + 3 * i) for i, r in enumerate(_requests(policy))]
    groups, _ = engine.sample(requests, SamplingParams())
    assert [max(len(c.tokens) for c in group) for group in groups] == [1, 4, 7, 10, 13]


def test_what_it_cost(engine: Engine, policy: Policy) -> None:
    requests = _requests(policy, siblings=4)
    _, stats = engine.sample(requests, SamplingParams())
    assert stats.prefix_tokens == 4 * sum(len(r.prefix) for r in requests)
    assert 0 <= stats.prefix_tokens_encoded <= stats.prefix_tokens
    assert stats.seconds > 0
    assert engine.sample([], SamplingParams())[1].sampled_tokens == 0


def test_branches_find_most_of_their_prefix(engine: Engine, policy: Policy) -> None:
    """A rollout of 100 tokens and its branches: what was sampled need not be encoded again."""
    random = np.random.default_rng(5)
    prompt = tuple(int(t) for t in random.integers(2, len(policy.tokenizer), size=40))
    params = SamplingParams(temperature=0.9)
    (rollouts,), _ = engine.sample([SampleRequest(prompt, tuple(range(60)), 100)], params, keep=True)
    long = [c.tokens for c in rollouts if len(c.tokens) >= 90][:4]
    assert long
    branches = [SampleRequest(prompt + t[:85], tuple(rng.key("b", i, s) for s in range(4)), 8) for i, t in enumerate(long)]
    _, stats = engine.sample(branches, params)
    # of 125 tokens vLLM finds the whole blocks: 96 of 32 each
    assert stats.reused >= 96 / 125
    engine.forget()


def test_stop_strings_end_a_response_and_stay_in_it(engine: Engine, policy: Policy) -> None:
    groups, _ = engine.sample(_requests(policy, siblings=20), SamplingParams(stop=("3",)))
    stopped = 0
    for completion in (c for group in groups for c in group):
        text = policy.tokenizer.decode(completion.tokens, skip_special_tokens=True)
        assert text.count("3") <= 1
        if "3" in text:
            assert text.endswith("3") and completion.finish == "stop"
            stopped += 1
    assert stopped > 3


def test_a_stop_string_may_begin_before_the_pivot_and_may_be_a_special_token(engine: Engine, policy: Policy) -> None:
    tokenizer = policy.tokenizer
    (first,) = tokenizer("3", add_special_tokens=False).input_ids
    prompt = tuple(tokenizer("1+2:", add_special_tokens=False).input_ids)
    keys, hot = tuple(range(200)), SamplingParams(temperature=2.0)
    (free,), _ = engine.sample([SampleRequest((*prompt, first), keys, 6)], hot)
    second = next(c.tokens[0] for c in free if len(c.tokens) > 1)
    stop = SamplingParams(temperature=2.0, stop=(tokenizer.decode([first, second]),))
    (group,), _ = engine.sample([SampleRequest((*prompt, first), keys, 6, response_start=len(prompt))], stop)
    began = [c for c in group if c.tokens[0] == second]
    assert began and all(c.tokens == (second,) and c.finish == "stop" and len(c.logprobs) == 1 for c in began)
    # in the prompt it does not count
    (group,), _ = engine.sample([SampleRequest((*prompt, first), keys, 6)], stop)
    assert any(len(c.tokens) > 1 for c in group if c.tokens[0] == second)
    special = tokenizer.convert_ids_to_tokens(tokenizer.pad_token_id)
    (group,), _ = engine.sample([SampleRequest(prompt, keys, 20)], SamplingParams(temperature=2.0, stop=(special,)))
    stopped = [c for c in group if tokenizer.pad_token_id in c.tokens]
    assert stopped and all(c.tokens[-1] == tokenizer.pad_token_id and c.finish == "stop" for c in stopped)


def test_what_cannot_be_served_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineError, match=f"context is {CONTEXT}"):
        engine.sample([SampleRequest((3,) * 200, (1,), 57)], SamplingParams())
    with pytest.raises(EngineError, match="no tokens"):
        engine.sample([SampleRequest((), (1,), 5)], SamplingParams())
    with pytest.raises(EngineError, match="max_new_tokens is 0"):
        engine.sample([SampleRequest((3,), (1,), 0)], SamplingParams())


def test_sampling_leaves_the_training_mode_as_it_was(engine: Engine, policy: Policy) -> None:
    policy.model.train()
    try:
        engine.sample(_requests(policy, 1), SamplingParams())
        assert policy.model.training
    finally:
        policy.model.eval()


def test_new_weights_are_sampled_from_unasked(engine: Engine, policy: Policy) -> None:
    """Whoever moved them: an optimizer, a checkpoint, a copy. Prompts that were encoded with the old ones are encoded anew."""
    requests = [SampleRequest(r.prefix, r.keys[:1], r.max_new_tokens) for r in _requests(policy, count=8)]
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    old, _ = engine.sample(requests, SamplingParams(greedy=True))
    torch.manual_seed(9)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.05)
    for parameter in policy.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    new, _ = engine.sample(requests, SamplingParams(greedy=True))
    assert [list(c.tokens) for (c,) in new] == [_generated(policy, r) for r in requests]
    assert sum(a != b for a, b in zip(_tokens(old), _tokens(new), strict=True)) >= 6
    policy.model.load_state_dict(before)
    again, _ = engine.sample(requests, SamplingParams(greedy=True))
    assert _tokens(again) == _tokens(old)
