"""Learners that never have the whole model: each part gets its weights, and is cut before the next one comes."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from group import close, run_group
from torch import nn
from trees import make_tree

from deepgrpo.cluster.actors import LearnerRank
from deepgrpo.cluster.sharding import gather_weights
from deepgrpo.config import Config
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.model.materialize import FrozenState, Materializer, TensorBytes, first_of_each_kind, judge_meta_policy
from deepgrpo.model.policy import Policy, Reference
from deepgrpo.train.build import build_policy, build_shapes
from deepgrpo.train.learner import Learner
from deepgrpo.train.optim import build_optimizer
from tiny import byte_tokenizer, save_model

TREES = [
    make_tree([(6, 0.0), (5, 1.0), (7, 0.0)], [(0, 4, [(2, 1.0), (3, 0.0)]), (2, 0, [(4, 0.0), (5, 1.0), (2, 0.0)])]),
    make_tree([(4, 1.0), (4, 0.0)]),
]
CREDITS = [sibling_credit(tree) for tree in TREES]
SECTIONS: dict[str, Any] = {
    "optim": {"lr": 1e-3, "eps": 1e-4}, "loss": {"beta": 0.1}, "cluster": {"learners": 2, "sharding": "fsdp"},
    "learner": {"gradient_checkpointing": True},
}  # fmt: skip


def start_of(policy: Policy) -> tuple[dict[str, np.ndarray], FrozenState]:
    """What the driver hands over."""
    weights = gather_weights(policy, keep=True)
    assert weights is not None
    return {name: value.copy() for name, value in weights.items()}, FrozenState.of(policy)


def moved(policy: Policy) -> Policy:
    """To weights that no seed gives."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return policy


def begun(config: Config, rank: int, weights: dict[str, np.ndarray], fixed: FrozenState, whole: bool) -> LearnerRank:
    learner = LearnerRank(config, "cpu", rank, exact_sampler=True)
    assert learner.start(weights, fixed) is whole
    return learner


def two_steps(rank: int, config: Config, weights: dict[str, np.ndarray], fixed: FrozenState) -> Any:
    learner = begun(config, rank, weights, fixed, whole=False)
    updates = [learner.learner.update(TREES, CREDITS).metrics for _ in range(2)]
    verdict = learner.policy.verdict
    recomputes = {getattr(layer, "gradient_checkpointing", None) for layer in learner.policy.layers or ()}
    return gather_weights(learner.policy, keep=True), updates, verdict, recomputes == {True}


def models(tmp_path: Path, kind: Any) -> dict[str, Any]:
    if kind == "scratch":
        return {}
    if kind == "adapters":
        pytest.importorskip("peft")
    lora = {"rank": 2} if kind == "adapters" else None
    # the base of adapters is stored in bfloat16: shards of two dtypes
    llama, dtype = ("llama", "bfloat16") if kind == "adapters" else (kind, "float32")
    path = save_model(tmp_path / "model", llama, dtype=dtype)
    return {
        "model": {"type": "pretrained", "path": path, "lora": lora},
        "data": {"type": "synthetic", "template": {"chat": False}},
    }


@pytest.mark.parametrize("kind", ["scratch", "llama", "qwen2", "adapters"])
def test_built_in_parts_they_take_the_steps_of_one_process(recipe: Any, tmp_path: Path, kind: str) -> None:
    """Tied heads, biases and adapters, with a reference, packed and recomputed; from weights that no seed gives."""
    config = recipe(**SECTIONS, **models(tmp_path, kind))
    policy = moved(build_policy(config, "cpu"))
    weights, fixed = start_of(policy)
    learner = Learner(policy, Reference.of(policy), build_optimizer(policy, config.optim), config)
    expected = [learner.update(TREES, CREDITS).metrics for _ in range(2)]
    for theirs, updates, verdict, recomputes in run_group(2, two_steps, config, weights, fixed):
        close(theirs, gather_weights(policy, keep=True))
        for one, other in zip(updates, expected, strict=True):
            close(one, other)
        assert verdict.packs and verdict.kernel == policy.verdict.kernel
        assert recomputes


def outlined(config: Config) -> Policy:
    outline = build_shapes(config)
    assert outline is not None
    return outline


def test_only_the_same_model_is_built_in_parts(recipe: Any) -> None:
    """Not with a buffer or a parameter too few or too many, one of another shape or dtype, or a tensor that is neither."""
    config = recipe()
    outline = outlined(config)
    weights, fixed = start_of(build_policy(config, "cpu"))
    values = fixed.values_for(outline, weights)
    assert values is not None and set(values) == {*weights, *fixed.buffers}
    name, buffer = next(iter(weights)), next(iter(fixed.buffers))
    without = {key: value for key, value in fixed.buffers.items() if key != buffer}
    double = {**fixed.buffers, buffer: TensorBytes.of(fixed.buffers[buffer].tensor().double())}
    assert dataclasses.replace(fixed, buffers=without).values_for(outline, weights) is None
    assert dataclasses.replace(fixed, buffers=double).values_for(outline, weights) is None
    assert fixed.values_for(outline, {**weights, name: weights[name][:1]}) is None
    assert fixed.values_for(outline, {**weights, "lm_head.weight": weights[name]}) is None
    assert fixed.values_for(outline, {key: value for key, value in weights.items() if key != name}) is None
    assert fixed.values_for(build_policy(config, "cpu"), weights) is None  # it lacks nothing
    next(outline.causal.children()).loose = torch.zeros(3, device="meta")
    assert fixed.values_for(outline, weights) is None


def test_bfloat16_and_numbers_without_a_dimension_are_stored() -> None:
    for tensor in (torch.randn(3, 4).bfloat16(), torch.tensor(2.5), torch.arange(3), torch.tensor(True)):
        back = TensorBytes.of(tensor).tensor()
        assert back.dtype == tensor.dtype and torch.equal(back, tensor)


def one_step(rank: int, config: Config, weights: dict[str, np.ndarray], fixed: FrozenState, whole: bool) -> Any:
    learner = begun(config, rank, weights, fixed, whole)
    learner.learner.update(TREES, CREDITS)
    return gather_weights(learner.policy, keep=True)


def takes_the_step_of(policy: Policy, config: Config, start: tuple[dict[str, np.ndarray], FrozenState], whole: bool) -> None:
    """Two learners that begin with `start`, which is the policy's, against the policy alone."""
    Learner(policy, Reference.of(policy), build_optimizer(policy, config.optim), config).update(TREES, CREDITS)
    for theirs in run_group(2, one_step, config, *start, whole):
        close(theirs, gather_weights(policy, keep=True))


@pytest.mark.parametrize("why", ["no outline", "another model"])
def test_otherwise_it_is_loaded_whole_and_learns_the_same(recipe: Any, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    config = recipe(**SECTIONS)
    policy = moved(build_policy(config, "cpu"))
    weights, fixed = start_of(policy)
    if why == "no outline":
        monkeypatch.setattr("deepgrpo.cluster.actors.build_shapes", lambda config: None)
    else:
        fixed = dataclasses.replace(fixed, buffers={})
    takes_the_step_of(policy, config, (weights, fixed), whole=True)


def test_a_head_that_is_tied_by_the_config_and_not_in_the_files(recipe: Any, tmp_path: Path) -> None:
    """transformers does not tie what the files tell apart: such a model is loaded whole."""
    from safetensors.torch import load_file, save_file

    sections = models(tmp_path, "llama")
    file = Path(sections["model"]["path"]) / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 2}, file, {"format": "pt"})
    config = recipe(**{**SECTIONS, **sections})
    policy = moved(build_policy(config, "cpu"))
    weights, fixed = start_of(policy)
    assert "lm_head.weight" in weights
    takes_the_step_of(policy, config, (weights, fixed), whole=True)


def test_ties_are_kept_and_values_copied(recipe: Any) -> None:
    config = recipe()
    outline = outlined(config)
    weights, fixed = start_of(build_policy(config, "cpu"))
    values = fixed.values_for(outline, weights)
    assert values is not None
    Materializer(outline, values, torch.device("cpu")).fill(outline.model)
    head, embeddings = outline.causal.get_output_embeddings().weight, outline.causal.get_input_embeddings().weight
    assert head is embeddings and isinstance(head, nn.Parameter)
    before = {name: value.copy() for name, value in weights.items()}
    with torch.no_grad():
        for parameter in outline.trainable().values():
            parameter.zero_()
    close(weights, before)


def test_the_first_layer_tells_whether_a_model_can_be_packed(recipe: Any) -> None:
    config = recipe(model={"num_layers": 5})
    loaded, outline = build_policy(config, "cpu"), outlined(config)
    weights, fixed = start_of(loaded)
    values = fixed.values_for(outline, weights)
    assert values is not None
    found = judge_meta_policy(outline, values, torch.device("cpu"))
    assert found.packs and found.kernel == loaded.verdict.kernel
    assert outline.device.type == "meta" and outline.layers is not None and len(outline.layers) == 5
    # of a model whose logits are not numbers, packs and paths cannot agree
    name = next(name for name in values if "layers.0" in name and name.endswith("weight"))
    assert not judge_meta_policy(outline, {**values, name: values[name] * np.nan}, torch.device("cpu")).packs


def test_and_the_first_of_each_kind_where_there_are_several(recipe: Any, tmp_path: Path) -> None:
    """Gemma 3: sliding layers, every third attends to all."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    tokenizer = byte_tokenizer()
    shape = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, sliding_window=16, pad_token_id=0,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForCausalLM(shape).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = recipe(
        model={"type": "pretrained", "path": str(tmp_path)}, data={"type": "synthetic", "template": {"chat": False}},
        **SECTIONS,
    )  # fmt: skip
    loaded, outline = moved(build_policy(config, "cpu")), outlined(config)
    assert loaded.verdict.packs and first_of_each_kind(outline) == [0, 2]
    weights, fixed = start_of(loaded)
    values = fixed.values_for(outline, weights)
    assert values is not None
    found = judge_meta_policy(outline, values, torch.device("cpu"))
    assert found.packs and found.kernel == loaded.verdict.kernel, found
    takes_the_step_of(loaded, config, (weights, fixed), whole=False)


def anonymous_mb() -> float:
    """Memory of this process that belongs to no file, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


def starts(rank: int, config: Config, directory: Path, fixed: FrozenState) -> float:
    """The most that a learner took while it got its weights, which lie in files, as if in Ray's store."""
    weights = {path.stem: np.load(path, mmap_mode="r") for path in directory.iterdir()}
    learner = LearnerRank(config, "cpu", rank, exact_sampler=True)
    gc.collect()
    before = anonymous_mb()
    taken: list[float] = []
    fill = Materializer.fill

    def watched(self: Materializer, part: nn.Module) -> None:
        fill(self, part)
        taken.append(anonymous_mb() - before)

    Materializer.fill = watched  # type: ignore[method-assign]
    assert not learner.start(weights, fixed) and len(taken) > 8
    return max(*taken, anonymous_mb() - before)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_no_learner_ever_has_the_whole_model(recipe: Any, tmp_path: Path) -> None:
    """8 layers of 16 MiB, a small rest: each of four learners has a quarter (32), a layer or two, and what Python takes."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_layers": 8, "num_heads": 4}
    config = recipe(cluster={"learners": 4, "sharding": "fsdp"}, model=shape)
    policy = build_policy(config, "cpu")
    weights, fixed = start_of(policy)
    for name, value in weights.items():
        np.save(tmp_path / f"{name}.npy", value)
    whole = sum(value.nbytes for value in weights.values()) / 2**20
    assert whole > 125
    for most in run_group(4, starts, config, tmp_path, fixed):
        assert most < 0.75 * whole
