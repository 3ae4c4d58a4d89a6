"""Models whose vocabulary is masked: logits of -inf are no error, and nothing about them is NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from deepgrpo.engines.base import SamplingParams, check_requests, named
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.engines.embedded.slot_gate import slot_objection
from deepgrpo.errors import EngineError
from deepgrpo.model.logprobs import distance
from deepgrpo.model.policy import Policy
from deepgrpo.records import SampleRequest
from tiny import byte_tokenizer

MASKED = slice(100, 250)


class Masked(LlamaForCausalLM):
    """Masks some tokens after its output layer."""

    part: Any = MASKED

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        mask = torch.zeros(output.logits.shape[-1], dtype=torch.bool)
        mask[self.part] = True
        output.logits = output.logits.masked_fill(mask, -torch.inf)
        return output


def build(kind: type[LlamaForCausalLM], *, bias: bool = False) -> Policy:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = kind(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False,
            initializer_range=0.3,
        )
    )  # fmt: skip
    if bias:
        layer = nn.Linear(32, len(tokenizer))
        layer.bias.data[MASKED] = -torch.inf
        layer.bias.requires_grad_(False)
        model.set_output_embeddings(layer)
    return Policy(model, tokenizer, 128)


def by_a_bias() -> Policy:
    return build(LlamaForCausalLM, bias=True)


def after_the_layer() -> Policy:
    return build(Masked)


@pytest.mark.parametrize(("make", "chunks"), [(by_a_bias, True), (after_the_layer, False)])
def test_a_masked_vocabulary_is_packed_decoded_and_measured(make: Any, chunks: bool) -> None:
    policy = make()
    assert policy.plain_head == chunks
    assert policy.try_tree_packing().packs, policy.verdict.reason
    assert slot_objection(policy) is None

    tokens = [5, 17, 9, 40, 2]
    ids, rows = torch.tensor([tokens]), torch.arange(4)
    logprobs, entropies = policy.logprobs(ids, rows, torch.tensor(tokens[1:]), temperature=1.0, with_entropy=True)
    p = torch.softmax(policy.model(ids).logits[0, :4].double(), -1)
    allowed = torch.cat([p[:, :100], p[:, 250:]], -1)
    assert torch.allclose(entropies.double(), -(allowed * allowed.log()).sum(-1), atol=1e-5)
    logprobs.sum().backward()
    assert all(q.grad.isfinite().all() for q in policy.trainable().values() if q.grad is not None)

    engine = EmbeddedEngine(policy)
    ((completion,),), _ = engine.sample([SampleRequest((5, 17), (3,), 20)], SamplingParams())
    assert all(not 100 <= token < 250 for token in completion.tokens)
    assert all(map(math.isfinite, completion.logprobs))


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(greedy=True), SamplingParams(top_p=0.9)])
@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_logits_without_a_token_to_draw_name_the_prompt(params: SamplingParams, value: float) -> None:
    policy = after_the_layer()
    engine = EmbeddedEngine(policy)
    policy.model.part = slice(0, 0)
    prompt = tuple(policy.tokenizer("two plus two?").input_ids)
    with torch.no_grad():
        policy.model.lm_head.weight.fill_(value)
    with pytest.raises(EngineError, match=r"not finite .* after 0 tokens of a response to the prompt that ends in 'two plus"):
        engine.sample([SampleRequest(prompt, (1,), 4)], params)


def test_equal_infinities_are_equal() -> None:
    inf = math.inf

    def apart(a: list[float], b: list[float]) -> float:
        return float(distance(Tensor(a), Tensor(b)))

    assert apart([-inf, 1.0, inf], [-inf, 1.5, inf]) == 0.5
    assert apart([-inf, 1.0], [0.0, 1.0]) == inf
    assert math.isnan(apart([math.nan, 1.0], [math.nan, 1.0]))


def test_a_token_without_a_row_is_refused_by_every_engine() -> None:
    with pytest.raises(EngineError, match="token id 7, but the model has embeddings for the ids below 7"):
        check_requests([SampleRequest((1, 7), (1,), 2)], 10, 7)


def test_an_error_of_the_engine_names_the_step() -> None:
    with pytest.raises(EngineError, match=r"^step 3: the logits"), named("step 3"):
        raise EngineError("the logits are not finite")
