"""The Ray actors that sample and learn. Inside them runs the code of a single process."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from deepgrpo.cluster.network import join_group, listen
from deepgrpo.cluster.ready import Ready
from deepgrpo.cluster.sharding import DistributedRanks, decoder_layers, gather_weights, load_weights, shard
from deepgrpo.config import Config, EmbeddedEngineConfig, RunConfig
from deepgrpo.engines.base import SampleStats, SamplingParams
from deepgrpo.model.materialize import FrozenState, Materializer, Values, judge_meta_policy
from deepgrpo.model.policy import Policy, Reference
from deepgrpo.records import Completion, Credit, SampleRequest, Tree
from deepgrpo.train.build import SamplerBuilder, build_policy, build_sampler, build_shapes, check_packing
from deepgrpo.train.learner import Learner, Update
from deepgrpo.train.moments import Moments, load_moments, moments_of, read_moments, save_shards
from deepgrpo.train.optim import build_optimizer

Weights = dict[str, np.ndarray]
"""Trained parameters by name: whole, float32."""


def _configure_torch(run: RunConfig) -> None:
    if run.threads:
        torch.set_num_threads(run.threads)
    torch.manual_seed(run.seed)


class RolloutWorker:
    """An engine with its own copy of the policy."""

    def __init__(self, config: Config, device: str, build: SamplerBuilder = build_sampler) -> None:
        _configure_torch(config.run)
        # it never trains, so the packing check is skipped
        learner = config.learner.model_copy(update={"tree_packing": "off", "gradient_checkpointing": False})
        plain = config.model_copy(update={"learner": learner})
        # vLLM has its own weights on the device; ours only supply them
        self.policy = build_policy(plain, device if isinstance(config.engine, EmbeddedEngineConfig) else "cpu")
        self.engine = build(config, self.policy)
        self.serial = -1

    def ready(self) -> Ready:
        return Ready.of_this_process(torch.get_num_threads(), self.engine)

    def sample(
        self, weights: Weights, serial: int, requests: Sequence[SampleRequest], params: SamplingParams, keep: bool
    ) -> tuple[list[list[Completion]], SampleStats]:
        """Sample as `Engine.sample`, with these weights, which are loaded if their serial number is new."""
        if serial != self.serial:
            self.engine.forget()
            load_weights(self.policy, weights)
            self.serial = serial
        return self.engine.sample(requests, params, keep=keep)

    def forget(self) -> None:
        self.engine.forget()


class LearnerRank:
    """One learner of a group."""

    def __init__(self, config: Config, device: str, rank: int, exact_sampler: bool) -> None:
        assert config.cluster is not None
        _configure_torch(config.run)
        self.config, self.rank, self.exact_sampler = config, rank, exact_sampler
        self.sharded, self.device = config.cluster.sharding == "fsdp", torch.device(device)
        # a sharded model is never whole: it has no weights before it is sharded
        shapes = build_shapes(config) if self.sharded else None
        self.without_weights, self.policy = shapes is not None, shapes or build_policy(config, device)
        self.learner: Learner
        self.listener: socket.socket | None = None

    def ready(self) -> Ready:
        return replace(Ready.of_this_process(torch.get_num_threads()), without_weights=self.without_weights)

    def address(self) -> tuple[str, int]:
        """Listen at a free port of this node for the process group; return the address."""
        import ray

        self.listener = listen(ray.util.get_node_ip_address())
        host, port, *_ = self.listener.getsockname()
        return host, port

    def join(self, address: tuple[str, int]) -> None:
        """Join the process group at an address."""
        assert self.config.cluster is not None
        cluster, backend = self.config.cluster, "nccl" if self.device.type == "cuda" else "gloo"
        join_group(
            *address, self.rank, cluster.learners, backend=backend, timeout_s=cluster.update_deadline_s, listener=self.listener
        )

    def start(self, weights: Weights, fixed: FrozenState | None) -> bool:
        """Load the start weights, freeze the reference if the loss has a KL term, and shard both if the recipe says so.

        Args:
            fixed: everything else of the driver's policy, for models without weights.

        Returns True if the model is sharded and was whole here before.
        """
        config = self.config
        if self.sharded:
            decoder_layers(self.policy)  # an error if there are none
        values = fixed.values_for(self.policy, weights) if fixed is not None else None
        if fixed is not None and values is not None:
            self._adopt_findings(fixed, values)
        else:
            if self.without_weights:
                self.policy = build_policy(config, str(self.device))
            load_weights(self.policy, weights)
        reference = Reference.of(self.policy) if config.loss.beta > 0 else None
        if self.sharded:
            if reference and not reference.adapters:
                reference.policy = shard(reference.policy, self._filling(reference.policy, values))
            self.policy = shard(self.policy, self._filling(self.policy, values))
            if reference and reference.adapters:  # the reference is the trained model with its adapters switched off
                reference.policy = self.policy
        self.learner = Learner(
            self.policy, reference, build_optimizer(self.policy, config.optim), config, exact_sampler=self.exact_sampler,
            ranks=DistributedRanks(sharded=self.sharded),
        )  # fmt: skip
        return self.sharded and values is None

    def _adopt_findings(self, fixed: FrozenState, values: Values) -> None:
        """Attach results measured on real weights: the output head and the packing verdict."""
        policy = self.policy
        policy.head, policy.head_reason, policy.verdict = fixed.head, fixed.head_reason, fixed.verdict
        if fixed.verdict.packs:  # on all layers, on the driver's device; this device may have other kernels
            here = judge_meta_policy(policy, values, self.device)
            check_packing(self.config.learner.tree_packing, here)
            policy.adopt_verdict(replace(here, window=fixed.verdict.window))

    def _filling(self, policy: Policy, values: Values | None) -> Materializer | None:
        return None if values is None else Materializer(policy, values, self.device)

    def resume(
        self, weights: Weights, moments: Moments | None, directory: str, updates: int, optimizer_steps: int
    ) -> None:
        """Load weights and moments; `moments` None: each rank reads its shards from the directory."""
        load_weights(self.policy, weights)
        found = read_moments(self.policy, Path(directory)) if moments is None else moments
        load_moments(self.policy, self.learner.optimizer, found)
        self.learner.count(updates, optimizer_steps)

    def adopt(self, weights: Weights) -> None:
        """Load weights that the driver has changed."""
        load_weights(self.policy, weights)

    def update(self, batch: tuple[Sequence[Tree], Sequence[Credit]]) -> tuple[Update | None, Weights | None]:
        """Update on a batch, the same on all ranks; rank 0 returns the outcome and the new weights."""
        update = self.learner.update(*batch)
        weights = gather_weights(self.policy, keep=self.rank == 0)
        return (update, weights) if self.rank == 0 else (None, None)

    def likelihood(self, batch: tuple[Sequence[Tree], Sequence[Credit]]) -> tuple[np.ndarray, int] | None:
        """Log-probs of a batch, the same on all ranks; rank 0 returns them."""
        found = self.learner.likelihood(*batch)
        return found if self.rank == 0 else None

    def moments(self) -> Moments:
        return {key: value.cpu() for key, value in moments_of(self.policy, self.learner.optimizer).items()}

    def save_shards(self, directory: str) -> None:
        save_shards(moments_of(self.policy, self.learner.optimizer), Path(directory))
