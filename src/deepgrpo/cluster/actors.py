"""The two kinds of process: one that samples, one that learns. What runs inside them is the code of a single process."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from deepgrpo.cluster.sharding import DistributedRanks, decoder_layers, shard, take_weights, whole_weights
from deepgrpo.config import Config, EmbeddedEngine
from deepgrpo.engines.base import Engine, SampleStats, SamplingParams
from deepgrpo.model.materialize import FrozenState, Materializer, Values, judge_meta_policy
from deepgrpo.model.policy import Policy, Reference
from deepgrpo.records import Completion, Credit, SampleRequest, Tree
from deepgrpo.train.engine import build_engine
from deepgrpo.train.learner import Learner, Update
from deepgrpo.train.moments import Moments, load_moments, moments_of, read_moments, save_shards
from deepgrpo.train.optim import build_optimizer
from deepgrpo.train.setup import build_policy, check_packing, outline_of

Weights = dict[str, np.ndarray]
"""What is trained, by name: whole, float32."""

BuildEngine = Callable[[Config, Policy], Engine]
"""Makes a rollout worker's engine, in the worker; must be picklable."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What a process says of itself once it is ready for weights."""

    pid: int
    node: str
    exact: bool = True
    """Of its engine, as `remark`."""
    remark: str | None = None
    outlined: bool = False
    """Of a learner: whether it has a model without weights, and waits for all of them."""

    @classmethod
    def of_this_process(cls, engine: Engine | None = None) -> Hello:
        import ray

        node = str(ray.get_runtime_context().get_node_id())
        return cls(os.getpid(), node) if engine is None else cls(os.getpid(), node, engine.exact, engine.remark)


def _prepare(config: Config) -> None:
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)


class RolloutWorker:
    """An engine with a copy of the policy of its own."""

    def __init__(self, config: Config, device: str, build: BuildEngine = build_engine) -> None:
        _prepare(config)
        # it never trains, so it need not know whether it could be packed
        learner = config.learner.model_copy(update={"tree_packing": "off", "gradient_checkpointing": False})
        plain = config.model_copy(update={"learner": learner})
        # vLLM has weights of its own on the device; ours are only what it gets them from
        self.policy = build_policy(plain, device if isinstance(config.engine, EmbeddedEngine) else "cpu")
        self.engine = build(config, self.policy)
        self.serial = -1

    def hello(self) -> Hello:
        return Hello.of_this_process(self.engine)

    def sample(
        self, weights: Weights, serial: int, requests: Sequence[SampleRequest], params: SamplingParams, keep: bool
    ) -> tuple[list[list[Completion]], SampleStats]:
        """As `Engine.sample`, with the weights of that serial number, which are taken over if they are new."""
        if serial != self.serial:
            self.engine.forget()
            take_weights(self.policy, weights)
            self.serial = serial
        return self.engine.sample(requests, params, keep=keep)

    def forget(self) -> None:
        self.engine.forget()


class LearnerRank:
    """One of the processes that learn together."""

    def __init__(self, config: Config, device: str, rank: int, exact_sampler: bool) -> None:
        assert config.cluster is not None
        _prepare(config)
        self.config, self.rank, self.exact_sampler = config, rank, exact_sampler
        self.sharded, self.device = config.cluster.sharding == "fsdp", torch.device(device)
        # what is sharded is never whole: it has no weights before it is cut
        outline = outline_of(config) if self.sharded else None
        self.outlined, self.policy = outline is not None, outline or build_policy(config, device)
        self.learner: Learner

    def hello(self) -> Hello:
        return replace(Hello.of_this_process(), outlined=self.outlined)

    def address(self) -> tuple[str, int]:
        """Where the others may meet this one."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind(("", 0))
            return host, free.getsockname()[1]

    def join(self, address: tuple[str, int]) -> None:
        assert self.config.cluster is not None
        host, port = address
        if host.startswith("127."):
            # gloo would look for the interface of the machine's name
            loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
            if loopback:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo", init_method=f"tcp://{host}:{port}", rank=self.rank,
            world_size=self.config.cluster.learners,
            timeout=datetime.timedelta(seconds=self.config.cluster.update_deadline_s),
        )  # fmt: skip

    def begin(self, weights: Weights, fixed: FrozenState | None) -> bool:
        """Take over the start weights, freeze the reference where the loss has one, cut both in shards if asked for.

        Args:
            fixed: all else that the driver's policy has, for outlines.

        Returns whether the model is cut and was whole here before.
        """
        config = self.config
        if self.sharded:
            decoder_layers(self.policy)  # an error if there are none
        values = fixed.values_for(self.policy, weights) if fixed is not None else None
        if fixed is not None and values is not None:
            self._find_out(fixed, values)
        else:
            if self.outlined:
                self.policy = build_policy(config, str(self.device))
            take_weights(self.policy, weights)
        reference = Reference.of(self.policy) if config.loss.beta > 0 else None
        if self.sharded:
            if reference and not reference.adapters:
                reference.policy = shard(reference.policy, self._filling(reference.policy, values))
            self.policy = shard(self.policy, self._filling(self.policy, values))
            if reference and reference.adapters:  # they are switched off in the very model that is trained
                reference.policy = self.policy
        self.learner = Learner(
            self.policy, reference, build_optimizer(self.policy, config.optim), config, exact_sampler=self.exact_sampler,
            ranks=DistributedRanks(sharded=self.sharded),
        )  # fmt: skip
        return self.sharded and values is None

    def _find_out(self, fixed: FrozenState, values: Values) -> None:
        """Tell an outline what only a model with weights can be asked."""
        policy = self.policy
        policy.head, policy.head_reason, policy.verdict = fixed.head, fixed.head_reason, fixed.verdict
        if fixed.verdict.packs:  # says the driver, by all layers on its device; this one may have other back-ends
            here = judge_meta_policy(policy, values, self.device)
            check_packing(self.config, here)
            policy.pack_by(replace(here, window=fixed.verdict.window))

    def _filling(self, policy: Policy, values: Values | None) -> Materializer | None:
        return None if values is None else Materializer(policy, values, self.device)

    def resume(self, weights: Weights, moments: Moments | None, directory: str, optimizer_steps: int) -> None:
        """Take over weights and moments; `moments` None: each reads its shards from the directory."""
        take_weights(self.policy, weights)
        found = read_moments(self.policy, Path(directory)) if moments is None else moments
        load_moments(self.policy, self.learner.optimizer, found)
        self.policy.version = self.learner.optimizer_steps = optimizer_steps

    def take(self, weights: Weights) -> None:
        take_weights(self.policy, weights)

    def update(self, batch: tuple[Sequence[Tree], Sequence[Credit]]) -> tuple[Update | None, Weights | None]:
        """The same batch on all ranks; the first one tells what came of it, with the new weights."""
        update = self.learner.update(*batch)
        weights = whole_weights(self.policy, keep=self.rank == 0)
        return (update, weights) if self.rank == 0 else (None, None)

    def moments(self) -> Moments:
        return {key: value.cpu() for key, value in moments_of(self.policy, self.learner.optimizer).items()}

    def save_shards(self, directory: str) -> None:
        save_shards(moments_of(self.policy, self.learner.optimizer), Path(directory))
