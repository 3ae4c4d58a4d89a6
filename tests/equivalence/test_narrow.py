"""Adapters over a base that is stored in 16 bits: the numbers of a float32 base, at half its bytes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from trees import make_tree

from deepgrpo.cluster.sharding import gather_weights
from deepgrpo.config import GivenModel, LoraConfig, PretrainedModel
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.engines.base import SamplingParams
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.errors import ModelError
from deepgrpo.model import adapters
from deepgrpo.model.given import given_policy, handed_back
from deepgrpo.model.loading import load_policy
from deepgrpo.model.narrow import NarrowEmbedding, NarrowLinear, narrow, stored_dtype
from deepgrpo.model.policy import Policy
from deepgrpo.records import SampleRequest
from deepgrpo.train.learner import Learner
from deepgrpo.train.optim import build_optimizer
from tiny import save_model

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")

TREES = [
    make_tree([(6, 0.0), (5, 1.0), (7, 0.0)], [(0, 4, [(2, 1.0), (3, 0.0)])]),
    make_tree([(3, 1.0), (8, 0.0)], [(1, 6, [(1, 1.0), (9, 0.0)])], 5),
]
CREDITS = [sibling_credit(tree) for tree in TREES]
PROMPTS = [SampleRequest(tuple(range(5, 5 + n)), (n,), 12) for n in (3, 7)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> str:
    """A model in bfloat16 with biases and a tied head."""
    return save_model(tmp_path_factory.mktemp("base"), "qwen2", dtype="bfloat16")


def load(path: str, base_dtype: str = "auto", dtype: str = "float32") -> Policy:
    torch.manual_seed(7)
    lora = {"rank": 4, "base_dtype": base_dtype}
    policy = load_policy(PretrainedModel.model_validate({"path": path, "lora": lora}), dtype=dtype)
    with torch.no_grad():  # peft starts B at zero, and then A has no gradient
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.sin(torch.arange(parameter.numel())).view_as(parameter) * 0.2)
    return policy


def learn(policy: Policy, config: Any) -> dict[str, Tensor]:
    """The adapters after two updates."""
    assert policy.try_tree_packing().packs, policy.verdict.reason
    learner = Learner(policy, None, build_optimizer(policy, config.optim), config)
    for _ in range(2):
        learner.update(TREES, CREDITS)
    return {name: p.detach().clone() for name, p in policy.trainable().items()}


def test_bytes_are_two_per_frozen_matrix_and_four_for_the_rest(base: str) -> None:
    """Qwen2 of width 32: 258 tokens, feed-forward 64, 2 layers, 4 heads of 8 of which 2 have keys.

    matrices  258·32 + 2·(32·32 + 2·16·32 + 32·32 + 3·32·64) = 8,256 + 2·9,216 = 26,688
    vectors   2·(32 + 16 + 16 of the biases, 2·32 of the norms) + 32               =    288
    adapters  rank 4: 2·4·((32+32) + 2·(32+16) + (32+32) + 3·(32+64))              =  4,096
    """
    policy = load(base)
    size = sum(p.nbytes for p in policy.model.parameters())
    assert policy.narrow and size == 2 * 26_688 + 4 * (288 + 4_096) == 70_912
    assert sum(p.nbytes for p in load(base, "float32").model.parameters()) == 4 * (26_688 + 288 + 4_096) == 124_288
    assert all(p.dtype == torch.float32 for p in policy.trainable().values())
    # to the workers of a cluster go the adapters alone
    sent = gather_weights(policy, keep=True)
    assert sent is not None and sum(array.nbytes for array in sent.values()) == 4 * 4_096
    tied = policy.causal.get_output_embeddings().weight
    assert tied is policy.causal.get_input_embeddings().weight and tied.dtype == torch.bfloat16
    wide = dict(load(base, "float32").model.named_buffers())
    assert all(torch.equal(b, wide[name]) for name, b in policy.model.named_buffers()) and wide


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_moves_the_adapters_as_over_a_float32_base(
    base: str, recipe: Any, dtype: str, checkpointing: bool
) -> None:
    config = recipe(optim={"lr": 1e-2}, learner={"dtype": dtype})
    found = []
    for kind in ("auto", "float32"):
        policy = load(base, kind, dtype)
        if checkpointing:
            policy.checkpoint_activations()
        before = {name: p.detach().clone() for name, p in policy.trainable().items()}
        after = learn(policy, config)
        assert all(not torch.equal(before[name], after[name]) for name in before)
        found.append((before, after))
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_draws_the_same_tokens_and_shares_the_matrices(base: str, dtype: str) -> None:
    drawn = []
    for kind in ("auto", "float32"):
        policy = load(base, kind)
        engine = EmbeddedEngine(policy, max_rows=4, keep_bytes=2**20, dtype=getattr(torch, dtype))
        groups, _ = engine.sample(PROMPTS, SamplingParams(greedy=True))
        drawn.append([(c.tokens, c.logprobs) for group in groups for c in group])
        if kind == "auto" and dtype == "bfloat16":  # no copy of what is frozen already in that dtype
            copied: Any = engine.weights.current().model
            own = policy.causal.get_input_embeddings().weight
            assert copied.get_base_model().get_input_embeddings().weight.data_ptr() == own.data_ptr()
            assert all(p.dtype == torch.bfloat16 for p in copied.parameters())
            with torch.no_grad():  # adapters that move are seen
                for parameter in policy.trainable().values():
                    parameter.mul_(-3.0)
            again, _ = engine.sample(PROMPTS, SamplingParams(greedy=True))
            assert again != groups
        elif kind == "auto":
            assert not engine.weights.copied and engine.exact
    assert drawn[0] == drawn[1]


def test_a_bfloat16_base_of_a_float32_model_is_off_by_its_rounding(tmp_path: Path) -> None:
    path = save_model(tmp_path, "qwen2")
    ids = torch.arange(3, 40)[None]

    def logprobs(policy: Policy) -> Tensor:
        with torch.no_grad():
            return torch.log_softmax(policy.causal(input_ids=ids).logits, -1)

    rounded = load(path, "float32")
    with torch.no_grad():  # what storage in bfloat16 does, by hand
        for name, parameter in rounded.model.named_parameters():
            if "lora" not in name:
                parameter.copy_(parameter.bfloat16())
    asked, exact = load(path, "bfloat16"), load(path)
    assert asked.narrow and not exact.narrow  # auto: the dtype it came in
    assert torch.equal(logprobs(asked), logprobs(rounded))
    assert 0 < float((logprobs(asked) - logprobs(exact)).abs().mean()) < 0.05


def test_weights_that_other_modules_use_stay_wide() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({
        "plain": nn.Linear(3, 2), "own": Own(3, 2), "table": nn.Embedding(4, 3), "tied": Own(3, 4), "trained": nn.Linear(2, 2),
    })  # fmt: skip
    model["tied"].weight = model["table"].weight
    model.requires_grad_(False)
    model["trained"].requires_grad_(True)
    narrow(model, torch.bfloat16)
    assert {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16} == {"plain.weight"}
    assert [name for name, m in model.named_modules() if isinstance(m, NarrowLinear | NarrowEmbedding)] == ["plain"]


def test_a_model_that_reads_its_weights_itself_gets_float32(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "computes", lambda causal: "RuntimeError: mat1 and mat2 must have the same dtype")
    policy = load(base)
    assert not policy.narrow and {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert all(type(m) is not NarrowLinear for m in policy.model.modules())
    with pytest.raises(ModelError, match=r'model\.lora\.base_dtype is "bfloat16", but .* set it to "float32"'):
        load(base, "bfloat16")


def test_the_dtype_a_model_came_in_is_that_of_its_files(base: str, tmp_path: Path) -> None:
    class Says:
        dtype = torch.bfloat16

    assert stored_dtype(base, None) == torch.bfloat16
    assert stored_dtype("owner/name", Says) == torch.bfloat16 and stored_dtype("owner/name", None) == torch.float32
    # half of it in float32: nothing narrower holds it
    save_file({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert stored_dtype(str(tmp_path), Says) == torch.float32
    save_file({"a": torch.zeros(2).half(), "n": torch.zeros(2, dtype=torch.long)}, tmp_path / "model.safetensors")
    assert stored_dtype(str(tmp_path), None) == torch.float16


def test_a_given_model_in_bfloat16_comes_back_as_it_was(base: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(base)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        said = model(input_ids=ids).logits
    section = GivenModel(name="Qwen2ForCausalLM", digest="", lora=LoraConfig(rank=2)).holding((model, tokenizer))
    with handed_back(model):
        policy = given_policy(section)
        assert policy.narrow and policy.causal is model and model.model.norm.weight.dtype == torch.float32
        with torch.no_grad():
            assert policy.model(input_ids=ids).logits.dtype == torch.float32
    after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():  # new adapters add nothing
        assert torch.equal(model(input_ids=ids).logits, said)
