"""Weights laid out in blocks for sampling: the same product, and they follow their source."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from deepgrpo import rng
from deepgrpo.engines.base import SamplingParams
from deepgrpo.engines.embedded import packed as packed_module
from deepgrpo.engines.embedded import weights as weights_module
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.engines.embedded.packed import PackedLinear, supports_packing
from deepgrpo.model.policy import Policy
from deepgrpo.prompts import synthetic
from deepgrpo.records import SampleRequest

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not supports_packing(CPU, torch.bfloat16), reason="no packed bfloat16 products here")


def _policy(tied: bool = False) -> Policy:
    tokenizer = synthetic.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return Policy(LlamaForCausalLM(config).eval(), tokenizer, 128)


def _requests() -> list[SampleRequest]:
    return [SampleRequest((3, 4, 5 + i), tuple(rng.key(i, s) for s in range(4)), 16) for i in range(3)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 33), (5, 7, 33)])
def test_a_packed_layer_gives_what_the_layer_gives(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, given = nn.Linear(33, 17, bias=bias), torch.randn(*shape).bfloat16()
    packed = PackedLinear(layer, torch.bfloat16)
    expected = nn.functional.linear(given, layer.weight.bfloat16(), None if layer.bias is None else layer.bias.bfloat16())
    assert packed(given).shape == expected.shape
    assert torch.allclose(packed(given).float(), expected.float(), atol=0.02)
    with torch.no_grad():
        layer.weight.mul_(-1)
    assert torch.allclose(packed(given).float(), expected.float(), atol=0.02)  # not before it is told
    packed.refresh()
    assert not torch.allclose(packed(given).float(), expected.float(), atol=0.02)
    assert not list(packed.parameters()) and not list(packed.children())


def test_the_trial_leaves_the_random_stream_of_the_run_alone() -> None:
    """It is made at the first sampling of a process: a resumed run would go on with other random numbers."""
    before = torch.get_rng_state()
    assert supports_packing(CPU, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("tied", [True, False])
def test_an_engine_with_packed_layers_says_what_one_without_says(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = _policy(tied)
    quick = EmbeddedEngine(policy, dtype=torch.bfloat16)
    assert sum(isinstance(m, PackedLinear) for m in quick.weights.current().model.modules()) == 2 * 7 + 1
    got, _ = quick.sample(_requests(), SamplingParams())
    monkeypatch.setattr(weights_module, "supports_packing", lambda *_: False)
    slow = EmbeddedEngine(policy, dtype=torch.bfloat16)
    assert not any(isinstance(m, PackedLinear) for m in slow.weights.current().model.modules())
    expected, _ = slow.sample(_requests(), SamplingParams())
    for a, b in zip((c for g in got for c in g), (c for g in expected for c in g), strict=True):
        # up to where rounding decides a draw otherwise, the log-probs agree to what bfloat16 keeps
        same = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), len(a.tokens))
        assert a.logprobs[:same] == pytest.approx(b.logprobs[:same], abs=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_packed_layers_follow_the_policy(tied: bool) -> None:
    policy = _policy(tied)
    engine = EmbeddedEngine(policy, dtype=torch.bfloat16)
    first, _ = engine.sample(_requests(), SamplingParams())
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(-3)
    second, _ = engine.sample(_requests(), SamplingParams())
    fresh, _ = EmbeddedEngine(policy, dtype=torch.bfloat16).sample(_requests(), SamplingParams())
    assert first != second == fresh


def test_a_model_that_looks_at_a_weight_is_left_as_it_was() -> None:
    policy = _policy()

    class Curious(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return self.inner(given) * float(self.inner.weight.dtype == torch.bfloat16 or 1)  # type: ignore[no-any-return]

    layer = policy.causal.model.layers[0].mlp
    layer.down_proj = Curious(layer.down_proj)
    current = EmbeddedEngine(policy, dtype=torch.bfloat16).weights.current()
    assert not any(isinstance(m, PackedLinear) for m in current.model.modules())


def test_without_the_operators_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not supports_packing(CPU, torch.float32) and not supports_packing(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(packed_module, "OPERATORS", object())
    assert not supports_packing(CPU, torch.bfloat16)


def test_adapters_are_not_packed() -> None:
    from peft import LoraConfig, get_peft_model

    policy = _policy()
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = Policy(get_peft_model(policy.model, settings), policy.tokenizer, 128)
    engine = EmbeddedEngine(adapted, dtype=torch.bfloat16)
    names = [n for n, m in engine.weights.current().model.named_modules() if isinstance(m, PackedLinear)]
    assert names and not any("lora_" in name for name in names)
    engine.sample(_requests(), SamplingParams())
