"""Several learners are one: the same gradient, the same figures, checkpoints for any number of them. Real processes, gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from group import close, run_group
from trees import make_tree

from conftest import TINY
from deepgrpo.cluster.sharding import DistributedRanks, assign_packs, gather_weights, load_weights, shard
from deepgrpo.config import Config, ScratchModel
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.errors import TrainingError
from deepgrpo.model.loading import scratch_policy
from deepgrpo.model.policy import Policy, Reference
from deepgrpo.pack.budget import Pack
from deepgrpo.pack.layout import lay_out
from deepgrpo.prompts import synthetic
from deepgrpo.train.learner import Learner
from deepgrpo.train.moments import load_moments, moments_of, read_moments, save_moments, save_shards
from deepgrpo.train.optim import build_optimizer

TREES = [
    make_tree([(6, 0.0), (5, 1.0), (7, 0.0)], [(0, 4, [(2, 1.0), (3, 0.0)]), (2, 0, [(4, 0.0), (5, 1.0), (2, 0.0)])]),
    make_tree([(3, 1.0), (8, 0.0), (2, 0.0)], [(1, 6, [(1, 1.0), (9, 0.0)])], prompt_length=5),
    make_tree([(4, 1.0), (4, 0.0)]),
]
CREDITS = [sibling_credit(tree) for tree in TREES]


def fresh(seed: int = 3, packing: bool = True, recomputes: bool = False) -> Policy:
    policy = scratch_policy(ScratchModel.model_validate(TINY), synthetic.tokenizer(), seed=seed)
    if packing:
        assert policy.try_tree_packing().packs
    if recomputes:
        policy.checkpoint_activations()
    return policy


def learner_of(config: Config, sharding: str, seed: int = 3) -> Learner:
    """As one of the group."""
    policy = fresh(seed, config.learner.tree_packing != "off", config.learner.gradient_checkpointing)
    reference = Reference.of(fresh(4)) if config.loss.beta else None
    if sharding == "fsdp":
        policy = shard(policy)
        if reference:
            reference.policy = shard(reference.policy)
    ranks = DistributedRanks(sharded=sharding == "fsdp")
    return Learner(policy, reference, build_optimizer(policy, config.optim), config, ranks=ranks)


def work(rank: int, config: Config, sharding: str, steps: int) -> tuple[Any, Any, list[dict[str, float]]]:
    learner = learner_of(config, sharding)
    metrics = [learner.update(TREES, CREDITS).metrics for _ in range(steps)]
    weights = gather_weights(learner.policy, keep=True)
    return weights, learner.optimizer_steps, metrics


def alone(config: Config, steps: int) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    policy = fresh(packing=config.learner.tree_packing != "off")
    reference = Reference.of(fresh(4)) if config.loss.beta else None
    learner = Learner(policy, reference, build_optimizer(policy, config.optim), config)
    metrics = [learner.update(TREES, CREDITS).metrics for _ in range(steps)]
    weights = gather_weights(policy, keep=True)
    assert weights is not None
    return weights, metrics


# eps is large enough that AdamW does not turn the rounding of a gradient near zero into a whole step
OPTIM = {"lr": 1e-3, "eps": 1e-4}


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("size", "sections"),
    [
        pytest.param(2, {"learner": {"tokens_per_pack": 30}}, id="several packs each"),
        pytest.param(3, {"loss": {"beta": 0.1}, "learner": {"tokens_per_pack": 60}}, id="reference, fewer packs than learners"),
        pytest.param(
            2,
            {
                "optim": {**OPTIM, "minibatches": 2, "epochs": 2}, "loss": {"ratio": "sequence"},
                "learner": {"tokens_per_pack": 25},
            },
            id="old log-probs",
        ),
        pytest.param(2, {"learner": {"tree_packing": "off", "gradient_checkpointing": True}}, id="rows, recomputed"),
    ],
)  # fmt: skip
def test_a_group_takes_the_step_of_one(recipe: Any, sharding: str, size: int, sections: Any) -> None:
    """Weights after two updates and every figure; learners without a pack take part."""
    config = recipe(**{"optim": OPTIM, **sections})
    weights, metrics = alone(config, 2)
    for their_weights, _, theirs in run_group(size, work, config, sharding, 2):
        close(their_weights, weights)
        for one, other in zip(theirs, metrics, strict=True):
            close(one, other)


def probe(rank: int, config: Config, sharding: str) -> tuple[np.ndarray, int]:
    learner = learner_of(config, sharding)
    learner.update(TREES, CREDITS)  # log-probs leave the mode and the weights of an update as they are
    found = learner.likelihood(TREES, CREDITS)
    learner.update(TREES, CREDITS)
    return found


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_group_finds_the_log_probs_of_one(recipe: Any, sharding: str) -> None:
    """Three packs for two learners, so that one of them forwards an idle pack where the model is sharded."""
    config = recipe(loss={"beta": 0.0}, optim=OPTIM, learner={"tokens_per_pack": 32})
    policy = fresh()
    learner = Learner(policy, None, build_optimizer(policy, config.optim), config)
    learner.update(TREES, CREDITS)
    expected, forwarded = learner.likelihood(TREES, CREDITS)
    assert (expected < 0).all() and len(learner._pack(TREES, lay_out(TREES, CREDITS))) == 3
    for values, tokens in run_group(2, probe, config, sharding):
        assert values == pytest.approx(expected, rel=1e-5)
        assert tokens == forwarded


def test_packs_are_spread_by_tokens() -> None:
    """9 to the first, 6 to the second, which has less and takes 5 as well."""
    packs = [Pack(np.zeros((1, n)), np.zeros(0), np.zeros(0), n) for n in (5, 9, 6)]
    assert [[pack.num_tokens for pack in share] for share in assign_packs(packs, 2)] == [[9], [6, 5]]
    assert [len(share) for share in assign_packs(packs, 4)] == [1, 1, 1, 0]


def broken(rank: int, config: Config, sharding: str) -> str:
    learner = learner_of(config, sharding)
    with torch.no_grad():
        next(iter(learner.policy.trainable().values())).fill_(float("nan"))
    try:
        learner.update(TREES, CREDITS)
    except TrainingError as error:
        return str(error)
    return "no error"


def test_all_learners_refuse_a_step_that_is_not_finite(recipe: Any) -> None:
    for said in run_group(2, broken, recipe(), "ddp"):
        assert said.startswith("the loss of step 1 (optimizer step 0) is nan, so the step was not taken")


# ---------------------------------------------------------------- checkpoints


def saves(rank: int, config: Config, directory: Path) -> Any:
    learner = learner_of(config, "fsdp")
    learner.update(TREES, CREDITS)
    save_shards(moments_of(learner.policy, learner.optimizer), directory)
    at_save = gather_weights(learner.policy, keep=True)
    learner.update(TREES, CREDITS)
    return at_save, gather_weights(learner.policy, keep=True)


def goes_on(rank: int, config: Config, sharding: str, directory: Path, weights: Any) -> Any:
    learner = learner_of(config, sharding, seed=8)
    load_weights(learner.policy, weights)
    load_moments(learner.policy, learner.optimizer, read_moments(learner.policy, directory))
    learner.update(TREES, CREDITS)
    return gather_weights(learner.policy, keep=True)


def test_shards_are_resumed_by_any_number_of_learners(recipe: Any, tmp_path: Path) -> None:
    """Two learners save their shards; three, one, two with whole moments, and a single process go on as they do."""
    config = recipe(optim=OPTIM)
    ((weights, expected), _) = run_group(2, saves, config, tmp_path)
    for size, sharding in [(3, "fsdp"), (1, "fsdp"), (2, "ddp")]:
        for found in run_group(size, goes_on, config, sharding, tmp_path, weights):
            close(found, expected)
    policy = fresh(8)
    load_weights(policy, weights)
    optimizer = build_optimizer(policy, config.optim)
    load_moments(policy, optimizer, read_moments(policy, tmp_path))
    # and back into a file that needs no torch.distributed, which two learners cut in shards again
    whole = tmp_path / "whole"
    whole.mkdir()
    save_moments(moments_of(policy, optimizer), whole)
    Learner(policy, None, optimizer, config).update(TREES, CREDITS)
    close(gather_weights(policy, keep=True), expected)
    for found in run_group(2, goes_on, config, "fsdp", whole, weights):
        close(found, expected)


def beside_a_gpu(rank: int) -> list[str]:
    """A build of torch with CUDA calls CUDA its accelerator, on machines without a GPU too."""
    torch._C._get_accelerator = lambda *_: torch.device("cuda")  # type: ignore[attr-defined]
    policy = shard(fresh())
    return sorted({str(parameter.device_mesh.device_type) for parameter in policy.trainable().values()})  # type: ignore[attr-defined]


def test_learners_on_cpus_are_sharded_there_by_a_torch_that_has_cuda() -> None:
    assert run_group(1, beside_a_gpu) == [["cpu"]]
