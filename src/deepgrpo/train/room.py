"""The memory that there is, and the refusal of a model that cannot fit in it."""

from __future__ import annotations

import torch

from deepgrpo.config import Config, GivenModel, ModelConfig, PretrainedModel
from deepgrpo.errors import ModelError
from deepgrpo.model.device import free_memory
from deepgrpo.model.policy import Policy
from deepgrpo.train.counts import Counts
from deepgrpo.train.memory import GIB, MemoryEstimate, learner_memory


def check_room(config: Config, policy: Policy, device: str) -> None:
    """Raise ModelError if a run in one process cannot fit on its device for any batch size.

    Activations, caches and the engine's copy are left out, so no model that would fit is refused.

    Args:
        policy: only its shapes are read.
        device: a torch device.
    """
    counts = Counts.of(policy)
    estimate = learner_memory(config, policy, counts, shards=1)
    room = free_memory(device)
    if estimate.certain > room:
        shares = device == "cpu" or counts.trial <= room
        raise ModelError(
            f"{_needs(config, policy, estimate)} on {device}, but {_gib(room)} are free; {_remedies(config, shares)}"
        )


def check_cluster_room(config: Config, policy: Policy, *, cuda: bool) -> None:
    """Raise ModelError if a process of the cluster cannot fit on this machine.

    The driver runs here, and all other processes too if `cluster.address` is absent. Other machines are not checked.

    Args:
        policy: only its shapes are read.
        cuda: true if learners are on GPUs.
    """
    cluster, counts = config.cluster, Counts.of(policy)
    assert cluster is not None
    learner = learner_memory(config, policy, counts, cluster.learners if cluster.sharding == "fsdp" else 1)
    whole = counts.weights
    room = free_memory("cpu")
    here = whole
    if cluster.address is None and not cuda:
        here += cluster.learners * learner.certain + cluster.rollout_workers * whole
    if here > room:
        what = "" if here == whole else (
            f"; so do {cluster.rollout_workers} rollout workers, and {cluster.learners} learners take {_gib(learner.certain)} "
            f"each ({_parts(learner)}): {_gib(here)} together"
        )  # fmt: skip
        raise ModelError(
            f"{_named(config.model, counts)} takes {_gib(whole)} in the driver{what}; but {_gib(room)} are free on this "
            f"machine; {_remedies(config, False)}"
        )
    if cluster.address is None and cuda:
        # total memory: what occupies the GPUs now may be gone by then
        count = torch.cuda.device_count()
        largest = max((int(torch.cuda.get_device_properties(i).total_memory) for i in range(count)), default=None)
        if largest is not None and learner.certain > largest:
            raise ModelError(
                f"{_needs(config, policy, learner)} in each of cluster.learners = {cluster.learners} "
                f"(cluster.sharding = \"{cluster.sharding}\"), but the largest GPU here has {_gib(largest)}; "
                f"{_remedies(config, counts.trial <= largest)}"
            )


def _needs(config: Config, policy: Policy, estimate: MemoryEstimate) -> str:
    counts = Counts.of(policy)
    return f"{_named(config.model, counts)} takes {_gib(estimate.certain)} ({_parts(estimate)})"


def _named(model: ModelConfig, counts: Counts) -> str:
    if isinstance(model, PretrainedModel):
        key = f"model.path = {model.path!r}"
    else:
        key = f"the {model.name} given" if isinstance(model, GivenModel) else f"model.hidden_size = {model.hidden_size}"
    return f"the model of {counts.every / 1e9:,.2f} billion parameters ({key})"


def _parts(estimate: MemoryEstimate) -> str:
    if estimate.start == estimate.certain:
        return "at the start, when each module is whole before it is sharded"
    parts = {
        "weights": estimate.weights, "gradients": estimate.gradients, "moments": estimate.optimizer,
        "reference": estimate.reference,
    }  # fmt: skip
    return ", ".join(f"{name} {value / GIB:,.1f}" for name, value in parts.items() if value)


def _remedies(config: Config, shares: bool) -> str:
    """List the remedies. `shares`: more learners would help."""
    adapters = isinstance(config.model, PretrainedModel) and config.model.lora is not None
    sharded = config.cluster is not None and config.cluster.sharding == "fsdp"
    return ", ".join(
        [
            *(["train adapters (model.lora)"] if isinstance(config.model, PretrainedModel) and not adapters else []),
            *(["set loss.beta = 0, which takes no reference"] if config.loss.beta > 0 and not adapters else []),
            *(
                ["raise cluster.learners" if sharded else 'shard it over GPUs (cluster.sharding = "fsdp", cluster.learners)']
                if shares else []
            ),
            "or take a smaller model",
        ]
    )  # fmt: skip


def _gib(count: int) -> str:
    return f"{count / GIB:,.1f} GiB"
