"""How a model makes logits of its last hidden state: found by asking the model, and never believed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from deepgrpo.model.head import Head
from deepgrpo.model.policy import Policy, Reference
from deepgrpo.prompts import synthetic

WIDE = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, **WIDE,
}  # fmt: skip


def causal_class(family: str) -> Any:
    return getattr(transformers, f"{family}ForCausalLM", None) or getattr(transformers, f"{family}LMHeadModel", None)


def build(family: str, **settings: Any) -> nn.Module:
    """A tiny random model of a family. Its biases are random too: at their usual start, zero, they would prove nothing."""
    config = getattr(transformers, f"{family}Config")(vocab_size=len(synthetic.tokenizer()), **settings)
    torch.manual_seed(0)
    model: nn.Module = causal_class(family)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def policy_of(model: nn.Module) -> Policy:
    return Policy(model, synthetic.tokenizer(), 64, logprob_chunk=3)


def agrees(policy: Policy) -> bool:
    """Whether log-probs, entropies and sampling logits are those of the model's own logits."""
    ids, rows = torch.arange(10).view(2, 5) % 7, torch.tensor([0, 2, 5, 8])
    target = torch.tensor([3, 1, 4, 1])
    with torch.no_grad():
        own = policy.causal(input_ids=ids, use_cache=False).logits.flatten(0, 1)[rows]
        logprobs, entropy = policy.logprobs(ids, rows, target, temperature=0.8, with_entropy=True)
        sampled = policy.logits(policy.run(rows, input_ids=ids, use_cache=False))
    log_p = torch.log_softmax(own / 0.8, -1)
    return (
        torch.allclose(logprobs, log_p.gather(1, target[:, None]).squeeze(1), atol=1e-5)
        and torch.allclose(entropy, -(log_p.exp() * log_p).sum(-1), atol=1e-5)
        and torch.allclose(sampled, own, atol=1e-5)
    )


FAMILIES: list[tuple[str, dict[str, Any], Head]] = [
    ("Llama", SHAPE, Head()),
    ("Qwen2", SHAPE | {"tie_word_embeddings": True}, Head()),
    ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **WIDE}, Head()),
    ("Phi", SHAPE, Head()),
    ("Gemma2", SHAPE | {"head_dim": 8}, Head(softcap=30.0)),
    ("Gemma2", SHAPE | {"head_dim": 8, "final_logit_softcapping": 0.01}, Head(softcap=0.01)),
    ("Gemma2", SHAPE | {"head_dim": 8, "final_logit_softcapping": None}, Head()),
    ("Granite", SHAPE | {"logits_scaling": 8.0}, Head(scale=0.125)),
    ("Granite", SHAPE, Head()),
    ("Cohere", SHAPE, Head(scale=0.0625)),
    ("Cohere2", SHAPE | {"logit_scale": 3.0}, Head(scale=3.0)),
    ("MiniCPM3", SHAPE | {"dim_model_base": 4}, Head(scale=0.25)),
    ("HyperCLOVAX", SHAPE | {"logits_scaling": 5.0}, Head(scale=5.0)),
    ("NanoChat", SHAPE, Head(softcap=15.0)),
]


@pytest.mark.parametrize(("family", "shape", "head"), FAMILIES)
def test_the_head_of_a_family(family: str, shape: dict[str, Any], head: Head) -> None:
    if causal_class(family) is None:
        pytest.skip(f"this transformers has no {family}")
    policy = policy_of(build(family, **shape))
    assert policy.head == head, policy.head_reason
    assert policy.plain_head and policy.head_reason == ""
    assert agrees(policy)


def test_a_cap_is_seen_however_small_the_logits_are() -> None:
    """Logits near 1e-4 under a cap of 30 change by 1e-15: only raw logits of the probe's own making can show it."""
    model = build("Gemma2", **SHAPE, head_dim=8)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight").mul_(1e-3)
    assert policy_of(model).head == Head(softcap=30.0)


def test_the_gradient_through_the_head_is_the_models_own() -> None:
    model = build("Gemma2", **SHAPE, head_dim=8, final_logit_softcapping=0.05)
    policy, ids = policy_of(model), torch.arange(12).view(2, 6)
    rows, target = torch.tensor([0, 3, 4, 7, 10]), torch.tensor([5, 4, 3, 2, 1])
    full = torch.log_softmax(model(input_ids=ids, use_cache=False).logits.flatten(0, 1)[rows] / 0.6, -1)
    full.gather(1, target[:, None]).sum().backward()
    slow = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    policy.logprobs(ids, rows, target, temperature=0.6)[0].sum().backward()
    assert policy.plain_head and slow
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, slow[name], rtol=1e-4, atol=1e-5), name


def own_logits(model: nn.Module, change: Any) -> nn.Module:
    """The model with a forward of its own, which makes something else of its logits."""
    plain = type(model).forward

    class Own(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = plain(self, *args, **kwargs)
            output.logits = change(output.logits)
            return output

    model.__class__ = Own
    return model


def cap(value: float) -> Any:
    return lambda logits: value * torch.tanh(logits / value)


def shifted(logits: Tensor) -> Tensor:
    """The last token can never come."""
    logits = logits.clone()
    logits[..., -1] = -torch.inf
    return logits


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"final_logit_softcapping": 30.0}, cap(50.0)),  # another cap than the config says
        ({"final_logit_softcapping": 30.0}, cap(30.01)),
        ({}, cap(30.0)),  # one that it does not mention
        ({"logits_scaling": 8.0}, lambda logits: logits / 8.01),
        ({"logits_scaling": 8.0, "final_logit_softcapping": 30.0}, lambda logits: cap(30.0)(logits) / 8.0),
        ({}, lambda logits: logits.clamp(-100, 100)),
        ({}, lambda logits: logits + 1e-3),
        ({}, lambda logits: logits[..., :-1]),
        ({}, shifted),
    ],
    ids=["other-cap", "near-cap", "hidden-cap", "other-scale", "other-order", "clamp", "shift", "fewer", "mask"],
)
def test_a_config_that_tells_something_else_is_not_believed(settings: dict[str, Any], change: Any) -> None:
    """The logits of this model are near 0.1, so that none of the caps shows in them."""
    policy = policy_of(own_logits(build("Llama", **SHAPE, **settings), change))
    assert policy.head is None and not policy.plain_head
    assert "no scale or soft cap that its config names" in policy.head_reason
    if not policy.causal(input_ids=torch.zeros(1, 1, dtype=torch.long)).logits.isinf().any():
        assert agrees(policy)


def test_a_config_that_says_more_than_the_model_does() -> None:
    """Llama ignores a cap in its config, and so do we."""
    policy = policy_of(build("Llama", **SHAPE, final_logit_softcapping=30.0, logits_scaling=8.0))
    assert policy.head == Head() and agrees(policy)


def test_a_scale_before_and_a_scale_with_a_cap_behind() -> None:
    settings = {"logits_scaling": 8.0, "final_logit_softcapping": 0.2}
    model = own_logits(build("Llama", **SHAPE, **settings), lambda logits: cap(0.2)(logits / 8.0))
    policy = policy_of(model)
    assert policy.head == Head(0.125, 0.2) and agrees(policy)


def halve_input(model: nn.Module) -> None:
    model.get_submodule("lm_head").register_forward_pre_hook(lambda _, args: (args[0] / 2,))


def test_hidden_states_scaled_before_a_bias() -> None:
    """(h/2) Wᵀ + b is not (h Wᵀ + b)/2, and with a bias that is still zero nothing but the input could tell."""
    model = build("Phi", **SHAPE, logits_scaling=2.0)
    halve_input(model)
    with torch.no_grad():
        model.get_parameter("lm_head.bias").zero_()
    policy = policy_of(model)
    assert policy.head is None and "before an output layer with a bias" in policy.head_reason and agrees(policy)


def test_hidden_states_that_are_changed_on_their_way() -> None:
    model = build("Llama", **SHAPE)
    model.get_submodule("lm_head").register_forward_pre_hook(lambda _, args: (args[0].tanh(),))
    policy = policy_of(model)
    assert policy.head is None and "does not see the last hidden state" in policy.head_reason and agrees(policy)


def test_an_output_layer_that_is_no_plain_linear() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model: Any = build("Llama", **SHAPE)
    model.lm_head.__class__ = Doubled
    policy = policy_of(model)
    assert policy.head is None and "Doubled" in policy.head_reason and agrees(policy)


def test_an_output_layer_that_does_more_than_it_says() -> None:
    model: Any = build("Llama", **SHAPE)
    model.lm_head.register_forward_hook(lambda _m, _a, output: output * 2)
    policy = policy_of(model)
    assert policy.head is None and "more than a product" in policy.head_reason and agrees(policy)


def test_a_learned_scale_is_no_constant() -> None:
    """It begins at 1, where nothing shows, and moves with training."""
    model: Any = build("Llama", **SHAPE)
    model.gain = nn.Parameter(torch.ones(()))
    policy = policy_of(own_logits(model, lambda logits: logits * model.gain))
    assert policy.head is None and "gain" in policy.head_reason and agrees(policy)


def test_a_family_without_a_backbone_of_its_own() -> None:
    model = build("Llama", **SHAPE)
    model.base_model_prefix = "nothing_of_this_name"  # type: ignore[assignment]
    policy = policy_of(model)
    assert policy.head is None and "no backbone" in policy.head_reason and agrees(policy)


def test_a_layer_that_is_not_called() -> None:
    class Aside(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
            hidden = self.model(input_ids=input_ids, **inputs).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ self.lm_head.weight.t())

    model = build("Llama", **SHAPE)
    model.__class__ = Aside
    policy = policy_of(model)
    assert policy.head is None and "is not called" in policy.head_reason and agrees(policy)


def test_a_probe_that_fails_leaves_the_model_as_it_was() -> None:
    model: Any = build("Llama", **SHAPE).train()
    del model.model.norm  # AttributeError within the forward pass
    policy = policy_of(model)
    assert policy.head is None and "raised AttributeError" in policy.head_reason
    assert model.training and not model.lm_head._forward_hooks


def test_the_probe_leaves_nothing_behind() -> None:
    model: Any = build("Gemma2", **SHAPE, head_dim=8).train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    policy = policy_of(model)
    assert policy.plain_head and model.training and not model.lm_head._forward_hooks
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def test_weights_that_are_replaced_are_followed() -> None:
    model: Any = build("Gemma2", **SHAPE, head_dim=8, tie_word_embeddings=False)
    policy = policy_of(model)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    assert agrees(policy)
    model.lm_head = nn.Linear(16, model.lm_head.out_features, bias=False)
    assert agrees(policy)


def test_the_reference_has_the_same_head() -> None:
    policy = policy_of(build("Granite", **SHAPE, logits_scaling=4.0))
    assert Reference.of(policy).policy.head == policy.head == Head(scale=0.25)


def test_adapters_and_an_adapted_head() -> None:
    peft = pytest.importorskip("peft")
    settings: dict[str, Any] = {"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    inner = peft.get_peft_model(build("Cohere", **SHAPE), peft.LoraConfig(target_modules=["q_proj"], **settings))
    policy = policy_of(inner.eval())
    assert policy.head == Head(scale=0.0625) and agrees(policy)
    outer = peft.get_peft_model(
        build("Cohere", **SHAPE, tie_word_embeddings=False), peft.LoraConfig(target_modules=["lm_head"], **settings)
    )
    policy = policy_of(outer.eval())
    assert policy.head is None and "peft" in policy.head_reason and agrees(policy)


def test_bf16_arithmetic_caps_after_rounding() -> None:
    """Under autocast the output layer multiplies in bf16; scale and cap follow in float32, as in the learner."""
    policy = policy_of(build("Gemma2", **SHAPE, head_dim=8, final_logit_softcapping=0.05))
    policy.dtype = torch.bfloat16
    rows = torch.arange(4)
    with torch.no_grad(), policy.autocast():
        logits = policy.logits(policy.run(rows, input_ids=rows[None], use_cache=False))
    assert logits.dtype == torch.float32 and float(logits.abs().max()) <= 0.05
