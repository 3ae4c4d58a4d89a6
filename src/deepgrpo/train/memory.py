"""What a run needs of memory, from the shapes of its model alone, and the refusal of one that cannot fit.

P parameters, t of them trained, in float32; N learners that share them (`cluster.sharding = "fsdp"`), else N = 1.

    learner           weights 4 P / N, gradient 4 t / N, moments 8 t / N, reference 4 P / N; activations
    rollout worker    4 P, and the engine's own copy, if it has one; keys and values
    driver            4 P
    object store      8 t: the weights of this step and of the last

`tests/unit/test_memory.py` works an example by hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from deepgrpo.config import Config, EmbeddedEngine, PretrainedModel, VLLMEngine
from deepgrpo.engines.vllm.engine import CPU_CACHE_GIB
from deepgrpo.errors import ModelError
from deepgrpo.explore.base import Strategy
from deepgrpo.model.materialize import first_of_each_kind
from deepgrpo.model.policy import Policy

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by use, in one memory (a device's, or that of the host). Activations are a rule of thumb (per token and layer 12
    values of the hidden size and 4 of the feed-forward size, or, where they are recomputed, 2 and the rest for one layer,
    plus the chunk of logits); measure before you rely on them.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    reference: int = 0
    engine: int = 0
    """The engine's copy of the weights, if it has one: in bfloat16, or in vLLM's process."""
    transfer: int = 0
    """The file in memory through which weights reach vLLM."""
    stored: int = 0
    """Weights on their way to rollout workers, through Ray's object store."""
    cache: int = 0
    kept: int = 0
    """Rollouts that later rounds come back to, at most; 0 where there are none."""
    gathered: int = 0
    """Of a sharded model: what is whole at a time, at most."""
    activations: int = 0
    start: int = 0
    """While the process starts, of all that is above: a model is loaded before it is moved, a part whole before it is cut."""

    @property
    def certain(self) -> int:
        """What no setting of batch, length or engine changes: the most of weights, gradients, moments and reference."""
        return max(self.start, self.weights + self.gradients + self.optimizer + self.reference)

    @property
    def total(self) -> int:
        # sampling and learning take turns: what the engine holds and the activations are not there at the same time
        sampling, learning = self.cache + self.kept, self.gathered + self.activations
        held = self.weights + self.gradients + self.optimizer + self.reference + self.engine + self.transfer + self.stored
        return max(self.start, held + max(sampling, learning))


@dataclass(frozen=True, slots=True)
class Holder:
    """A kind of process of a cluster, and what each of its kind takes of one memory.

    Example: Holder("rollout worker", 4, "GPU", MemoryEstimate(engine=2 * P, cache=20 * GIB)).
    """

    name: str
    count: int | None
    """Processes of the kind; None: there is one on every node."""
    memory: Literal["GPU", "host"]
    estimate: MemoryEstimate


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of parameters. Example: a model of two layers of 10 and an embedding of 50 has Counts(70, 70, 10, 50)."""

    every: int
    trained: int
    layer: int
    """Of the largest decoder layer; 0 if no layers are found."""
    rest: int
    """Outside the layers: embeddings, head, last norm."""
    kinds: int = 1
    """Kinds of decoder layers, such as sliding and full attention."""

    @property
    def trial(self) -> int:
        """Bytes of what each learner tries before anything is cut, however many there are: the first layer of each kind, the
        gradient of one, and the rest.
        """
        return 4 * (self.rest + (self.kinds + 1) * self.layer)

    @classmethod
    def of(cls, policy: Policy) -> Counts:
        every = _count(policy.model)
        layers = [_count(layer) for layer in policy.layers or ()]
        trained = sum(p.numel() for p in policy.trainable().values())
        return cls(every, trained, max(layers, default=0), every - sum(layers), len(first_of_each_kind(policy)))


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- formulas


def estimate_memory(config: Config, policy: Policy, strategy: Strategy, slot_length: int) -> MemoryEstimate:
    """Of a run in one process, on its device.

    Args:
        policy: only its shapes are looked at: one without weights (`model/meta_policy.py`) will do.
        strategy: whether later rounds come back to rollouts.
        slot_length: the longest prompt plus response, in tokens.
    """
    counts = Counts.of(policy)
    learner = _learner(config, policy, counts, shards=1)
    engine = _engine(config, policy, strategy, counts, slot_length, _capacity(config))
    return replace(learner, engine=engine.engine, cache=engine.cache, kept=engine.kept)


def estimate_cluster(config: Config, policy: Policy, strategy: Strategy, slot_length: int) -> tuple[Holder, ...]:
    """Of a run with a section [cluster]: every kind of process, in each memory that it takes of.

    GPUs are meant unless `run.device` is "cpu", or "auto" on a machine without any that is the whole cluster.
    The arguments are those of `estimate_memory`.
    """
    cluster, counts = config.cluster, Counts.of(policy)
    assert cluster is not None
    shards = cluster.learners if cluster.sharding == "fsdp" else 1
    learner = _learner(config, policy, counts, shards)
    engine = _engine(config, policy, strategy, counts, slot_length, _capacity(config), cluster.rollout_workers)
    whole, trained = 4 * counts.every, 4 * counts.trained
    if isinstance(config.engine, VLLMEngine):
        # its policy only hands the weights on, from host memory
        own = MemoryEstimate(weights=whole, transfer=_width(config) * counts.every)
        on_host, on_device = own, engine
    else:
        on_host, on_device = MemoryEstimate(start=whole), replace(engine, weights=whole)
    # the moments come to the driver whole when a checkpoint is written, unless learners write their shards themselves
    moments = 0 if cluster.sharding == "fsdp" else 2 * trained
    driver = Holder("driver", 1, "host", MemoryEstimate(weights=whole, optimizer=moments))
    # learners that are sharded load nothing: all of the model reaches them from the driver
    at_start = whole if cluster.sharding == "fsdp" else 0
    store = Holder("object store", None, "host", MemoryEstimate(stored=2 * trained, optimizer=moments, start=at_start))
    if not _on_gpus(config):
        if isinstance(config.engine, VLLMEngine):
            on_device = replace(on_device, weights=on_host.weights, transfer=on_host.transfer)
        return (
            Holder("learner", cluster.learners, "host", learner),
            Holder("rollout worker", cluster.rollout_workers, "host", on_device), driver, store,
        )  # fmt: skip
    return (
        Holder("learner", cluster.learners, "GPU", learner),
        # the first of them hands the new weights to the object store
        Holder("learner", cluster.learners, "host", MemoryEstimate(stored=trained, start=whole - at_start)),
        Holder("rollout worker", cluster.rollout_workers, "GPU", on_device),
        Holder("rollout worker", cluster.rollout_workers, "host", on_host), driver, store,
    )  # fmt: skip


def _learner(config: Config, policy: Policy, counts: Counts, shards: int) -> MemoryEstimate:
    """Of one of `shards` learners that share the model."""
    shape: Any = policy.causal.config.get_text_config()
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    value = 2 if config.learner.dtype == "bfloat16" else 4
    intermediate = getattr(shape, "intermediate_size", None) or 4 * hidden
    tokens = config.learner.tokens_per_pack
    one_layer = 12 + 4 * intermediate // hidden
    kept = 2 * layers + one_layer if config.learner.gradient_checkpointing else layers * one_layer
    # logits, their softmax and its gradient; all rows of a pass at once where the head is not known
    rows = config.learner.logprob_chunk if policy.plain_head else tokens
    activations = tokens * hidden * kept * value + 3 * rows * shape.vocab_size * 4
    if policy.plain_head:
        activations += min(config.learner.logprob_keep_mb * 2**20, tokens * shape.vocab_size * 4)
    adapters = counts.trained < counts.every
    copied = config.loss.beta > 0 and not adapters
    gathered = start = 0
    if shards > 1:
        # Outside the layers nothing is cut again before the backward pass is over, nor ever in the reference, which has
        # none. Of the layers there are the one that is computed and the next; and the gradient of what is whole.
        gathered = 4 * ((2 if copied else 1) * counts.rest + 2 * counts.layer)
        gathered += 0 if adapters else 4 * (counts.rest + counts.layer)
        # layer after layer gets its weights and is cut, and at last what is in none
        cut = math.ceil((8 if copied else 4) * counts.every / shards) + 4 * max(counts.rest, counts.layer)
        start = max(cut, counts.trial)
    learns = learns_anything(config)
    return MemoryEstimate(
        weights=math.ceil(4 * counts.every / shards),
        gradients=math.ceil(4 * counts.trained / shards) if learns else 0,
        optimizer=math.ceil(8 * counts.trained / shards) if learns else 0,
        reference=math.ceil(4 * counts.every / shards) if copied else 0,
        gathered=gathered, activations=activations, start=start,
    )  # fmt: skip


def learns_anything(config: Config) -> bool:
    """Whether there will be gradients and moments: not so in a run of no step that takes its warm start over, or has none."""
    return config.run.steps > 0 or (config.warmstart is not None and config.warmstart.from_ is None)


def _engine(
    config: Config, policy: Policy, strategy: Strategy, counts: Counts, slot_length: int, capacity: int | None,
    workers: int = 1,
) -> MemoryEstimate:  # fmt: skip
    """What an engine holds besides the policy, on its device; one of `workers` that share the prompts of a step.

    Args:
        capacity: bytes of the GPU; None: it has none, or is elsewhere.
    """
    shape: Any = policy.causal.config.get_text_config()
    engine, stored = config.engine, _width(config)
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    per_token = shape.num_hidden_layers * 2 * heads * width * stored
    cache = engine.max_rows * slot_length * per_token
    if isinstance(engine, EmbeddedEngine):
        rollouts = math.ceil(config.run.prompts_per_step * config.explore.num_rollouts / workers)
        keeps = strategy.returns(0) and policy.plain_head
        return MemoryEstimate(
            engine=stored * counts.every if stored == 2 else 0,
            cache=cache,
            # keys, values and last hidden states, up to engine.keep_mb
            kept=min(engine.keep_mb * 2**20, rollouts * slot_length * (per_token + shape.hidden_size * stored)) if keeps else 0,
        )
    # vLLM has its own copy in any dtype, and takes its cache as a whole; it may be spread over several GPUs
    spread = max(1, int(engine.options.get("tensor_parallel_size", 1)))
    own = stored * counts.every // spread
    if engine.kv_cache_gb:
        cache = int(engine.kv_cache_gb * GIB)
    elif config.run.device == "cpu":
        cache = int(CPU_CACHE_GIB * GIB)
    elif capacity is not None:
        cache = max(0, int(engine.gpu_memory * capacity) - own)
    else:  # what all its rows would fill
        cache //= spread
    return MemoryEstimate(engine=own, cache=cache)


def _width(config: Config) -> int:
    """Bytes of a value in the engine."""
    return 2 if config.engine_dtype == "bfloat16" else 4


# ---------------------------------------------------------------- memory that there is


def _on_gpus(config: Config) -> bool:
    assert config.cluster is not None
    if config.run.device == "auto" and config.cluster.address is None:
        return torch.cuda.is_available()
    return config.run.device != "cpu"


def _capacity(config: Config) -> int | None:
    """Bytes of the GPU that the recipe means, if it is in this machine."""
    local = config.cluster is None or config.cluster.address is None
    if config.run.device == "cpu" or not local or not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0 if config.run.device == "auto" else config.run.device).total_memory)


def free_memory(device: str) -> int | None:
    """Bytes that can be taken on a device of this machine, swap included; None if that cannot be known."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not on Linux
        return None
    found = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
    available = found.get("MemAvailable")
    return None if available is None else available + found.get("SwapFree", 0)


def check_room(config: Config, policy: Policy, device: str) -> None:
    """Raise ModelError if a run in one process cannot fit on its device, whatever the batch.

    Activations, caches and the engine's copy are left out, so nothing that would have fitted is refused.

    Args:
        policy: only its shapes are looked at.
        device: as torch names it.
    """
    counts = Counts.of(policy)
    estimate = _learner(config, policy, counts, shards=1)
    room = free_memory(device)
    if room is not None and estimate.certain > room:
        shares = device == "cpu" or counts.trial <= room
        raise ModelError(
            f"{_needs(config, policy, estimate)} on {device}, but {_gib(room)} are free; {_remedies(config, shares)}"
        )


def check_cluster_room(config: Config, policy: Policy, *, cuda: bool) -> None:
    """Raise ModelError if a process of the cluster cannot fit, as far as this machine can tell.

    The driver is here. The others are too where `cluster.address` is absent; of other machines nothing is known.

    Args:
        policy: only its shapes are looked at.
        cuda: whether learners are on GPUs.
    """
    cluster, counts = config.cluster, Counts.of(policy)
    assert cluster is not None
    learner = _learner(config, policy, counts, cluster.learners if cluster.sharding == "fsdp" else 1)
    whole = 4 * counts.every
    room = free_memory("cpu")
    here = whole
    if cluster.address is None and not cuda:
        here += cluster.learners * learner.certain + cluster.rollout_workers * whole
    if room is not None and here > room:
        what = "" if here == whole else (
            f"; so do {cluster.rollout_workers} rollout workers, and {cluster.learners} learners take {_gib(learner.certain)} "
            f"each ({_parts(learner)}): {_gib(here)} together"
        )  # fmt: skip
        raise ModelError(
            f"{_named(config, counts)} takes {_gib(whole)} in the driver{what}; but {_gib(room)} are free on this machine; "
            f"{_remedies(config, False)}"
        )
    if cluster.address is None and cuda:
        # whole GPUs: what is on them now may be gone by then
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
    return f"{_named(config, counts)} takes {_gib(estimate.certain)} ({_parts(estimate)})"


def _named(config: Config, counts: Counts) -> str:
    model = config.model
    key = f"model.path = {model.path!r}" if isinstance(model, PretrainedModel) else f"model.hidden_size = {model.hidden_size}"
    return f"the model of {counts.every / 1e9:,.2f} billion parameters ({key})"


def _parts(estimate: MemoryEstimate) -> str:
    if estimate.start == estimate.certain:
        return "at the start, when each part of it is whole before it is cut"
    parts = {
        "weights": estimate.weights, "gradients": estimate.gradients, "moments": estimate.optimizer,
        "reference": estimate.reference,
    }  # fmt: skip
    return ", ".join(f"{name} {value / GIB:,.1f}" for name, value in parts.items() if value)


def _remedies(config: Config, shares: bool) -> str:
    """What to do. `shares`: whether more learners would help."""
    adapters = isinstance(config.model, PretrainedModel) and config.model.lora is not None
    sharded = config.cluster is not None and config.cluster.sharding == "fsdp"
    return ", ".join(
        [
            *(["train adapters (model.lora)"] if isinstance(config.model, PretrainedModel) and not adapters else []),
            *(["set loss.beta = 0, which takes no reference"] if config.loss.beta > 0 and not adapters else []),
            *(
                ["raise cluster.learners" if sharded else 'share it among GPUs (cluster.sharding = "fsdp", cluster.learners)']
                if shares else []
            ),
            "or take a smaller model",
        ]
    )  # fmt: skip


def _gib(count: int) -> str:
    return f"{count / GIB:,.1f} GiB"
