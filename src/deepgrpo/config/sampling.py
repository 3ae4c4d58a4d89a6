"""Sections `sampling` and `engine`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from deepgrpo.config.base import Section


class SamplingConfig(Section):
    """The distribution that rollouts are drawn from, and when they stop."""

    temperature: PositiveFloat = 1.0
    """Logits are divided by this before the softmax."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus: the smallest set of tokens with at least this mass."""
    max_new_tokens: PositiveInt = 256
    """Longest response along a path, in tokens."""
    max_total_tokens: PositiveInt | None = None
    """Longest prompt plus response, in tokens; default: the model's context."""
    stop: tuple[str, ...] = ()
    """Strings that end a response (kept in it)."""
    dynamic: bool = False
    """Replace prompts whose tree carries no signal by further prompts, within the step, until `run.prompts_per_step` trees
    carry some (DAPO). All that was sampled is billed."""
    max_rounds: PositiveInt = 10
    """With `dynamic`: rounds of prompts in a step, the first one counted; what is missing then stays missing."""


class EmbeddedEngine(Section):
    """Batched decoding with the model that is being trained."""

    type: Literal["embedded"] = "embedded"
    max_rows: PositiveInt = 64
    """Sequences decoded at once; the next waiting one takes the place of one that ends."""
    keep_mb: Annotated[int, Field(ge=0)] = 2048
    """Memory for keys and values of rollouts, in MiB, so that branches need not encode their prefix again; beyond it they
    are encoded (and counted in the ledger). 0: keep nothing."""
    dtype: Literal["learner", "float32", "bfloat16"] = "learner"
    """Of weights, keys and values while sampling; "learner": as learner.dtype. bfloat16 takes a second copy of the weights,
    half their size, and samples about twice as fast on processors with bfloat16 instructions (`deepgrpo doctor` says which);
    its log-probs differ from the learner's, so importance weights are applied (loss.importance)."""


class VLLMEngine(Section):
    """Sampling by vLLM, in a process of its own, which gets the new weights after each update (docs/engines.md)."""

    type: Literal["vllm"] = "vllm"
    max_rows: PositiveInt = 256
    """Sequences decoded at once (vLLM's max_num_seqs)."""
    dtype: Literal["learner", "float32", "bfloat16"] = "learner"
    """Of weights, keys and values in vLLM; "learner": as learner.dtype."""
    prefix_caching: bool = True
    """Keep keys and values of what was encoded and sampled, so that the branches of a pivot need not encode their prefix
    again. False is for comparisons."""
    block_size: PositiveInt | None = None
    """Tokens per block of keys and values. A prefix is found again in whole blocks only, so a branch encodes up to as many
    tokens more than it would have to. none: the smallest that vLLM has, 32 on a CPU and 16 on a GPU."""
    kv_cache_gb: PositiveFloat | None = None
    """Memory for keys and values, in GiB; none: 4 on a CPU, on a GPU what `gpu_memory` leaves beside the weights."""
    gpu_memory: Annotated[float, Field(gt=0, le=1)] = 0.45
    """On a GPU: the share of its memory that vLLM may take while it samples. The learner needs the rest."""
    sleep: Literal["auto", "on", "off"] = "auto"
    """Give the GPU's memory back while nothing is sampled. auto: where vLLM can on this device; on: an error where not."""
    eager: bool = False
    """Compile nothing: it starts sooner and samples more slowly."""
    python: str | None = None
    """Interpreter of the environment that has vLLM; none: the one that runs this. Or set DEEPGRPO_VLLM_PYTHON."""
    start_timeout_s: PositiveFloat = 900.0
    """Seconds that vLLM may take to load the model and compile."""
    timeout_s: PositiveFloat = 3600.0
    """Seconds for one call of the engine; one that takes longer ends the run with an error."""
    options: dict[str, str | int | float | bool] = {}
    """More arguments of vLLM's `LLM`, by their names there, e.g. { tensor_parallel_size = 2 }."""

    def check(self, recipe: Any) -> None:
        if recipe.sampling.temperature > 2:
            raise ValueError(
                f"sampling.temperature is {recipe.sampling.temperature}, but vLLM takes at most 2; lower it, or set "
                'engine.type = "embedded"'
            )


EngineConfig = Annotated[EmbeddedEngine | VLLMEngine, Field(discriminator="type")]
