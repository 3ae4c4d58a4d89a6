"""Learners that never have the whole model: each part gets its weights, and is cut before the next one comes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from group import close, run_group
from torch import nn
from trees import make_tree

from deepgrpo.cluster.actors import LearnerRank
from deepgrpo.cluster.sharding import whole_weights
from deepgrpo.config import Config
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.model.parts import Filling, Fixed, fits, judge_part
from deepgrpo.model.policy import Policy, Reference
from deepgrpo.train.optim import build_optimizer
from deepgrpo.train.setup import build_policy, outline_of
from deepgrpo.train.step import Learner
from tiny import save_model

TREES = [
    make_tree([(6, 0.0), (5, 1.0), (7, 0.0)], [(0, 4, [(2, 1.0), (3, 0.0)]), (2, 0, [(4, 0.0), (5, 1.0), (2, 0.0)])]),
    make_tree([(4, 1.0), (4, 0.0)]),
]
CREDITS = [sibling_credit(tree) for tree in TREES]
SECTIONS: dict[str, Any] = {
    "optim": {"lr": 1e-3, "eps": 1e-4}, "loss": {"beta": 0.1}, "cluster": {"learners": 2, "sharding": "fsdp"},
    "learner": {"gradient_checkpointing": True},
}  # fmt: skip


def start_of(policy: Policy) -> tuple[dict[str, np.ndarray], Fixed]:
    """What the driver hands over."""
    weights = whole_weights(policy, keep=True)
    assert weights is not None
    return {name: value.copy() for name, value in weights.items()}, Fixed.of(policy)


def begun(config: Config, rank: int, weights: dict[str, np.ndarray], fixed: Fixed) -> LearnerRank:
    learner = LearnerRank(config, "cpu", rank, exact_sampler=True)
    assert learner.policy.device.type == "meta"
    learner.begin(weights, fixed)
    return learner


def two_steps(rank: int, config: Config, weights: dict[str, np.ndarray], fixed: Fixed) -> Any:
    learner = begun(config, rank, weights, fixed)
    updates = [learner.learner.update(TREES, CREDITS).metrics for _ in range(2)]
    verdict = learner.policy.verdict
    recomputes = {getattr(layer, "gradient_checkpointing", None) for layer in learner.policy.layers or ()}
    return whole_weights(learner.policy, keep=True), updates, verdict, recomputes == {True}


def models(tmp_path: Path, kind: str) -> dict[str, Any]:
    if kind == "scratch":
        return {}
    if kind == "adapters":
        pytest.importorskip("peft")
    lora = {"rank": 2} if kind == "adapters" else None
    path = save_model(tmp_path / "model", "llama" if kind == "adapters" else kind)  # type: ignore[arg-type]
    return {
        "model": {"type": "pretrained", "path": path, "lora": lora},
        "data": {"type": "synthetic", "template": {"chat": False}},
    }


@pytest.mark.parametrize("kind", ["scratch", "llama", "qwen2", "adapters"])
def test_built_in_parts_they_take_the_steps_of_one_process(recipe: Any, tmp_path: Path, kind: str) -> None:
    """Tied heads, biases and adapters, with a reference, packed and recomputed; from weights that no seed gives."""
    config = recipe(**SECTIONS, **models(tmp_path, kind))
    torch.manual_seed(5)
    policy = build_policy(config, "cpu")
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    weights, fixed = start_of(policy)
    learner = Learner(policy, Reference.of(policy), build_optimizer(policy, config.optim), config)
    expected = [learner.update(TREES, CREDITS).metrics for _ in range(2)]
    for theirs, updates, verdict, recomputes in run_group(2, two_steps, config, weights, fixed):
        close(theirs, whole_weights(policy, keep=True))
        for one, other in zip(updates, expected, strict=True):
            close(one, other)
        assert verdict.packs and verdict.backend == policy.verdict.backend
        assert recomputes


def test_what_the_outline_lacks_is_loaded_whole(recipe: Any, policy: Policy) -> None:
    """A buffer that the driver does not have, a parameter of another shape, a tensor that is neither."""
    config = recipe()
    outline = outline_of(config)
    assert outline is not None
    weights, fixed = start_of(build_policy(config, "cpu"))
    values = {**fixed.values, **weights}
    assert fits(outline, values)
    name = next(iter(fixed.values))
    assert not fits(outline, {key: value for key, value in values.items() if key != name})
    name = next(iter(weights))
    assert not fits(outline, {**values, name: values[name][:1]})
    next(outline.causal.children()).loose = torch.zeros(3, device="meta")
    assert not fits(outline, values)


def falls_back(rank: int, config: Config, weights: dict[str, np.ndarray], fixed: Fixed) -> Any:
    learner = begun(config, rank, weights, dataclasses.replace(fixed, values={}))
    learner.learner.update(TREES, CREDITS)
    return whole_weights(learner.policy, keep=True)


def test_and_learns_the_same(recipe: Any) -> None:
    config = recipe(**SECTIONS)
    policy = build_policy(config, "cpu")
    weights, fixed = start_of(policy)
    Learner(policy, Reference.of(policy), build_optimizer(policy, config.optim), config).update(TREES, CREDITS)
    for theirs in run_group(2, falls_back, config, weights, fixed):
        close(theirs, whole_weights(policy, keep=True))


def test_ties_are_kept_and_values_copied(recipe: Any) -> None:
    config = recipe()
    outline = outline_of(config)
    assert outline is not None
    weights, fixed = start_of(build_policy(config, "cpu"))
    Filling(outline, {**fixed.values, **weights}, torch.device("cpu")).fill(outline.model)
    head, embeddings = outline.causal.get_output_embeddings().weight, outline.causal.get_input_embeddings().weight
    assert head is embeddings and isinstance(head, nn.Parameter)
    before = {name: value.copy() for name, value in weights.items()}
    with torch.no_grad():
        for parameter in outline.trainable().values():
            parameter.zero_()
    close(weights, before)


def test_the_first_layers_tell_whether_a_model_can_be_packed(recipe: Any) -> None:
    config = recipe(model={"num_layers": 5})
    loaded, outline = build_policy(config, "cpu"), outline_of(config)
    assert outline is not None
    weights, fixed = start_of(loaded)
    values = {**fixed.values, **weights}
    found = judge_part(outline, values, torch.device("cpu"))
    assert found.packs and found.backend == loaded.verdict.backend
    assert outline.device.type == "meta" and outline.layers is not None and len(outline.layers) == 5
    # of a model whose logits are not numbers, packs and paths cannot agree
    name = next(name for name in values if "layers.0" in name and name.endswith("weight"))
    assert not judge_part(outline, {**values, name: values[name] * np.nan}, torch.device("cpu")).packs


def anonymous_mb() -> float:
    """Memory of this process that belongs to no file, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


def starts(rank: int, config: Config, directory: Path) -> float:
    """The most that a learner took while it got its weights, which lie in files, as if in Ray's store."""
    weights, fixed = ({path.stem: np.load(path, mmap_mode="r") for path in (directory / part).iterdir()} for part in "wf")
    learner = LearnerRank(config, "cpu", rank, exact_sampler=True)
    before, most = anonymous_mb(), 0.0
    fill = Filling.fill

    def watched(self: Filling, part: nn.Module) -> None:
        nonlocal most
        fill(self, part)
        most = max(most, anonymous_mb() - before)

    Filling.fill = watched  # type: ignore[method-assign]
    learner.begin(weights, Fixed(fixed, None, "not asked", learner.policy.verdict))
    return max(most, anonymous_mb() - before)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_no_learner_ever_has_the_whole_model(recipe: Any, tmp_path: Path) -> None:
    """8 layers of 16 MiB, a small rest: each of four learners has a quarter (32), a layer or two, and what Python takes."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_layers": 8, "num_heads": 4}
    config = recipe(cluster={"learners": 4, "sharding": "fsdp"}, model=shape)
    policy = build_policy(config, "cpu")
    weights, fixed = start_of(policy)
    for part, values in (("w", weights), ("f", fixed.values)):
        (tmp_path / part).mkdir()
        for name, value in values.items():
            np.save(tmp_path / part / f"{name}.npy", value)
    whole = sum(value.nbytes for value in weights.values()) / 2**20
    assert whole > 125
    for most in run_group(4, starts, config, tmp_path):
        assert most < 0.8 * whole
