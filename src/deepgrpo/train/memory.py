"""Memory estimates of a run, from the shapes of its model alone. `room.py` compares them with the memory there is.

P parameters, t of them trained, in W = 4 P bytes; N learners that shard them (`cluster.sharding = "fsdp"`), else N = 1. With
adapters over a base in 16 bits, n of whose parameters are narrow (`model/narrow.py`), W = 4 P - 2 n, some 2 P.

    learner           weights W / N, gradient 4 t / N, moments 8 t / N, reference 4 P / N (none with adapters); activations
    rollout worker    W, the engine's own copy if it has one, keys and values
    driver            W
    object store      8 t: the weights of this step and of the previous one

`tests/unit/test_memory.py` works an example by hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from deepgrpo.config import Config, EmbeddedEngineConfig, RunConfig, VLLMEngineConfig, WarmstartConfig
from deepgrpo.engines.vllm.engine import CPU_CACHE_GIB, sends_adapters
from deepgrpo.explore.base import Strategy
from deepgrpo.model.adapters import has_adapters
from deepgrpo.model.policy import Policy
from deepgrpo.model.shape import shape_of
from deepgrpo.train.counts import Counts

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by use, in one memory: a device's or the host's.

    Activations are a rule of thumb: per token and layer 12 values of the hidden size and 4 of the feed-forward size (where
    they are recomputed, 2 per layer and the rest for one layer), plus a chunk of logits. Measure before relying on them.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    reference: int = 0
    engine: int = 0
    """The engine's copy of the weights, if it has one: in bfloat16, or in vLLM's process."""
    transfer: int = 0
    """The in-memory file that carries weights to vLLM."""
    stored: int = 0
    """Weights in Ray's object store, for the rollout workers."""
    cache: int = 0
    """Keys and values of the sequences being sampled."""
    prefixes: int = 0
    """Keys and values of rollouts from which later rounds branch, at most."""
    gathered: int = 0
    """Parameters of a sharded model that are gathered at the same time, at most."""
    activations: int = 0
    start: int = 0
    """Peak while the process starts: a model is loaded before it is moved, a module is whole before it is sharded."""

    @property
    def certain(self) -> int:
        """Bytes that no setting of batch, length or engine changes: weights, gradients, moments and reference."""
        return max(self.start, self.weights + self.gradients + self.optimizer + self.reference)

    @property
    def total(self) -> int:
        # sampling and learning take turns, so the engine's cache and the activations do not coexist
        sampling, learning = self.cache + self.prefixes, self.gathered + self.activations
        held = self.weights + self.gradients + self.optimizer + self.reference + self.engine + self.transfer + self.stored
        return max(self.start, held + max(sampling, learning))


@dataclass(frozen=True, slots=True)
class Holder:
    """A kind of process of a cluster, and the bytes that each process of the kind needs in one memory.

    Example: Holder("rollout worker", 4, "GPU", MemoryEstimate(engine=2 * P, cache=20 * GIB)).
    """

    name: str
    count: int | None
    """Processes of the kind; None: one on every node."""
    memory: Literal["GPU", "host"]
    estimate: MemoryEstimate


# ---------------------------------------------------------------- formulas


def estimate_memory(config: Config, policy: Policy, strategy: Strategy, slot_length: int) -> MemoryEstimate:
    """Estimate the memory of a run in one process, on its device.

    Args:
        policy: only its shapes are read, so one without weights (`model/meta_policy.py`) is enough.
        strategy: says if later rounds branch from rollouts.
        slot_length: the longest prompt plus response, in tokens.
    """
    counts = Counts.of(policy)
    learner = learner_memory(config, policy, counts, shards=1)
    engine = _engine(config, policy, strategy, counts, slot_length, _capacity(config))
    return replace(learner, engine=engine.engine, cache=engine.cache, prefixes=engine.prefixes)


def estimate_cluster(config: Config, policy: Policy, strategy: Strategy, slot_length: int) -> tuple[Holder, ...]:
    """Estimate the memory of every kind of process of a run with a section [cluster], in each memory that it uses.

    Assumes GPUs unless `run.device` is "cpu", or "auto" on a machine without GPUs that is the whole cluster.
    The arguments are those of `estimate_memory`.
    """
    cluster, counts = config.cluster, Counts.of(policy)
    assert cluster is not None
    shards = cluster.learners if cluster.sharding == "fsdp" else 1
    learner = learner_memory(config, policy, counts, shards)
    engine = _engine(config, policy, strategy, counts, slot_length, _capacity(config), cluster.rollout_workers)
    whole, trained = counts.weights, 4 * counts.trained
    if isinstance(config.engine, VLLMEngineConfig):
        # its policy only passes the weights on, from host memory
        file = _value_bytes(config.engine_dtype) * counts.every
        own = MemoryEstimate(weights=whole, transfer=file)
        if sends_adapters(config.engine, policy):  # the base once, at the start
            own = MemoryEstimate(weights=whole, transfer=trained, start=whole + file)
        on_host, on_device = own, engine
    else:
        on_host, on_device = MemoryEstimate(start=whole), replace(engine, weights=whole)
    # for a checkpoint, the moments are sent whole to the driver, unless sharded learners write their own
    moments = 0 if cluster.sharding == "fsdp" else 2 * trained
    driver = Holder("driver", 1, "host", MemoryEstimate(weights=whole, optimizer=moments))
    # sharded learners load nothing: the driver sends them the whole model
    at_start = whole if cluster.sharding == "fsdp" else 0
    store = Holder("object store", None, "host", MemoryEstimate(stored=2 * trained, optimizer=moments, start=at_start))
    if not _on_gpus(config):
        if isinstance(config.engine, VLLMEngineConfig):
            on_device = replace(on_device, weights=on_host.weights, transfer=on_host.transfer)
        return (
            Holder("learner", cluster.learners, "host", learner),
            Holder("rollout worker", cluster.rollout_workers, "host", on_device), driver, store,
        )  # fmt: skip
    return (
        Holder("learner", cluster.learners, "GPU", learner),
        # the first learner puts the new weights into the object store
        Holder("learner", cluster.learners, "host", MemoryEstimate(stored=trained, start=whole - at_start)),
        Holder("rollout worker", cluster.rollout_workers, "GPU", on_device),
        Holder("rollout worker", cluster.rollout_workers, "host", on_host), driver, store,
    )  # fmt: skip


def learner_memory(config: Config, policy: Policy, counts: Counts, shards: int) -> MemoryEstimate:
    """Estimate the memory of one of `shards` learners that shard the model between them."""
    shape = shape_of(policy.causal.config)
    layers, hidden = shape.layers, shape.hidden
    value = 2 if config.learner.dtype == "bfloat16" else 4
    tokens = config.learner.tokens_per_pack
    one_layer = 12 + 4 * shape.intermediate // hidden
    kept = 2 * layers + one_layer if config.learner.gradient_checkpointing else layers * one_layer
    # logits, their softmax and its gradient; of all rows at once if the head is unknown
    rows = config.learner.logprob_chunk if policy.plain_head else tokens
    activations = tokens * hidden * kept * value + 3 * rows * shape.vocabulary * 4
    if policy.plain_head:
        activations += min(config.learner.logprob_keep_mb * 2**20, tokens * shape.vocabulary * 4)
    if policy.narrow:  # the output layer widened for its products
        activations += 4 * shape.vocabulary * hidden
    adapters = has_adapters(policy.model)
    copied = config.loss.beta > 0 and not adapters
    gathered = start = 0
    if shards > 1:
        # Parameters outside the layers stay gathered until the backward pass ends, and for good in the reference, which has
        # no backward pass. At peak, two layers are gathered (current and prefetched), plus gradients of gathered parameters.
        gathered = (2 if copied else 1) * counts.rest_weights + 2 * counts.layer_weights
        gathered += 0 if adapters else counts.rest_weights + counts.layer_weights
        # layer after layer gets its weights and is sharded, and then the rest
        sharding = math.ceil((2 if copied else 1) * counts.weights / shards)
        sharding += max(counts.rest_weights, counts.layer_weights)
        start = max(sharding, counts.trial)
    learns = needs_gradients(config.run, config.warmstart)
    return MemoryEstimate(
        weights=math.ceil(counts.weights / shards),
        gradients=math.ceil(4 * counts.trained / shards) if learns else 0,
        optimizer=math.ceil(8 * counts.trained / shards) if learns else 0,
        reference=math.ceil(4 * counts.every / shards) if copied else 0,
        gathered=gathered, activations=activations, start=start,
    )  # fmt: skip


def needs_gradients(run: RunConfig, warmstart: WarmstartConfig | None) -> bool:
    """True unless the run has no steps and imitates nothing: then it has neither gradients nor moments."""
    return run.steps > 0 or (warmstart is not None and warmstart.from_ is None)


def _engine(
    config: Config, policy: Policy, strategy: Strategy, counts: Counts, slot_length: int, capacity: int | None,
    workers: int = 1,
) -> MemoryEstimate:  # fmt: skip
    """Estimate the memory of an engine besides the policy, on its device.

    Args:
        capacity: bytes of the GPU; None: no GPU, or one on another machine.
        workers: engines that share the prompts of a step.
    """
    shape = shape_of(policy.causal.config)
    engine, stored = config.engine, _value_bytes(config.engine_dtype)
    per_token = shape.layers * 2 * shape.kv_heads * shape.head_dim * stored
    cache = engine.max_rows * slot_length * per_token
    if isinstance(engine, EmbeddedEngineConfig):
        rollouts = math.ceil(config.run.prompts_per_step * config.explore.num_rollouts / workers)
        keeps = strategy.returns(0) and policy.plain_head
        # a base in bfloat16 is the engine's, too; on a CPU it is packed, which takes a copy
        on_cpu = config.run.device == "cpu" or (config.run.device == "auto" and not torch.cuda.is_available())
        shared = 0 if on_cpu else counts.narrow
        return MemoryEstimate(
            engine=stored * (counts.every - shared) if stored == 2 else 0,
            cache=cache,
            # keys, values and last hidden states, up to engine.keep_mb
            prefixes=min(engine.keep_mb * 2**20, rollouts * slot_length * (per_token + shape.hidden * stored))
            if keeps
            else 0,
        )
    # vLLM has its own copy in any dtype, allocates its cache at once, and may spread both over several GPUs
    spread = max(1, int(engine.options.get("tensor_parallel_size", 1)))
    own = stored * counts.every // spread
    if engine.kv_cache_gb:
        cache = int(engine.kv_cache_gb * GIB)
    elif config.run.device == "cpu":
        cache = int(CPU_CACHE_GIB * GIB)
    elif capacity is not None:
        cache = max(0, int(engine.gpu_memory * capacity) - own)
    else:  # as much as all its rows would fill
        cache //= spread
    return MemoryEstimate(engine=own, cache=cache)


def _value_bytes(dtype: str) -> int:
    """Bytes of a value in the engine."""
    return 2 if dtype == "bfloat16" else 4


def _on_gpus(config: Config) -> bool:
    assert config.cluster is not None
    if config.run.device == "auto" and config.cluster.address is None:
        return torch.cuda.is_available()
    return config.run.device != "cpu"


def _capacity(config: Config) -> int | None:
    """Bytes of the GPU that the recipe names, if it is in this machine."""
    local = config.cluster is None or config.cluster.address is None
    if not config.run.device.startswith(("auto", "cuda")) or not local or not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0 if config.run.device == "auto" else config.run.device).total_memory)
