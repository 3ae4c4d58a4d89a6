"""Sections `sampling` and `engine`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from deepgrpo.config.base import PathText, Section


class SamplingConfig(Section):
    """Sampling distribution and stopping criteria of rollouts."""

    temperature: PositiveFloat = 1.0
    """Divisor of the logits before the softmax."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: the smallest set of tokens with at least this probability mass."""
    top_k: PositiveInt | None = None
    """Sample only among this many most likely tokens (and those that tie with the last of them); none: among all."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Sample only tokens with at least this share of the most likely token's probability; not together with `top_p`."""
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Divisor of the positive logits, and factor of the negative ones, of tokens that occur in the prompt or the response so
    far; 1: no penalty."""
    max_new_tokens: PositiveInt = 256
    """Longest response along a path, in tokens."""
    max_total_tokens: PositiveInt | None = None
    """Longest prompt plus response, in tokens; default: the model's context."""
    stop: tuple[str, ...] = ()
    """Strings that end a response (kept as its last characters)."""
    dynamic: bool = False
    """Replace prompts whose tree carries no signal by further prompts within the step, until `run.prompts_per_step` trees
    carry some (DAPO). All sampled tokens are billed."""
    max_rounds: PositiveInt = 10
    """With `dynamic`: rounds of prompts per step, including the first; after that the batch stays smaller."""


    @property
    def of_the_policy(self) -> bool:
        """True if tokens are drawn from the policy's own distribution at this temperature."""
        return self.top_p == 1.0 and self.top_k is None and self.min_p == 0.0 and self.repetition_penalty == 1.0

    @model_validator(mode="after")
    def _engines_agree(self) -> SamplingConfig:
        if self.min_p > 0.0 and self.top_p < 1.0:
            raise ValueError(
                f"sampling.min_p is {self.min_p} and sampling.top_p is {self.top_p}, but engines apply them in different "
                "orders, with different results; set sampling.top_p = 1 or sampling.min_p = 0"
            )
        return self

    def check(self, recipe: Any) -> None:
        if self.repetition_penalty != 1.0 and recipe.loss.importance == "off":
            raise ValueError(
                f"sampling.repetition_penalty is {self.repetition_penalty}, and nothing would weigh for it, as "
                'loss.importance is "off"; set loss.importance = "auto", or sampling.repetition_penalty = 1'
            )


class EmbeddedEngineConfig(Section):
    """Batched decoding by the trained model itself."""

    type: Literal["embedded"] = "embedded"
    max_rows: PositiveInt = 64
    """Sequences decoded at once; a waiting one takes the slot of one that ends."""
    keep_mb: Annotated[int, Field(ge=0)] = 2048
    """Memory for keys and values of rollouts, in MiB, which saves encoding the prefixes of branches again; beyond it they
    are encoded (and counted in the ledger). 0: keep nothing."""
    dtype: Literal["learner", "float32", "bfloat16"] = "learner"
    """dtype of weights, keys and values while sampling; "learner": learner.dtype. bfloat16 needs a second copy of the weights,
    half their size, and is about twice as fast on processors with bfloat16 instructions (see `deepgrpo doctor`); its
    log-probs differ from the learner's, so importance weights are applied (loss.importance)."""


class VLLMEngineConfig(Section):
    """Sampling by vLLM in its own process, which receives the weights after each update (docs/engines.md)."""

    type: Literal["vllm"] = "vllm"
    max_rows: PositiveInt = 256
    """Sequences decoded at once (vLLM's max_num_seqs)."""
    dtype: Literal["learner", "float32", "bfloat16"] = "learner"
    """dtype of weights, keys and values in vLLM; "learner": learner.dtype."""
    prefix_caching: bool = True
    """Keep keys and values of encoded and sampled tokens, which saves encoding the prefixes of branches again. false: for
    comparisons."""
    block_size: PositiveInt | None = None
    """Tokens per block of keys and values. Prefixes are reused in whole blocks only, so a branch encodes up to this many
    extra tokens. none: 32 on a CPU; on a GPU vLLM's choice, the one that its fastest attention backend has."""
    kv_cache_gb: PositiveFloat | None = None
    """Memory for keys and values, in GiB; none: 4 on a CPU; on a GPU, `gpu_memory` minus the weights."""
    gpu_memory: Annotated[float, Field(gt=0, le=1)] = 0.45
    """Share of the GPU's memory for vLLM while it samples. The learner needs the rest."""
    adapters: Literal["auto", "alone", "merged"] = "auto"
    """Form in which adapters (`model.lora`) are sent to vLLM after each update. alone: the adapters, added to the base that
    vLLM loaded at its start; merged: all weights, which samples faster; auto: alone, or merged where vLLM refuses them."""
    sleep: Literal["auto", "on", "off"] = "auto"
    """Release the GPU's memory between sampling rounds. auto: where vLLM supports it; on: an error where it does not."""
    eager: bool = False
    """Skip compilation: starts sooner, samples more slowly."""
    python: PathText | None = None
    """Python interpreter of an environment with vLLM; none: DEEPGRPO_VLLM_PYTHON, else the current one."""
    start_timeout_s: PositiveFloat = 900.0
    """Time limit for loading the model and compiling, in seconds."""
    timeout_s: PositiveFloat = 3600.0
    """Time limit per call of the engine, in seconds; a longer call ends the run with an error."""
    options: dict[str, str | int | float | bool] = {}
    """Further arguments of vLLM's `LLM`, by name, e.g. { tensor_parallel_size = 2 }."""

    def check(self, recipe: Any) -> None:
        if recipe.sampling.temperature > 2:
            raise ValueError(
                f"sampling.temperature is {recipe.sampling.temperature}, but vLLM takes at most 2; lower it, or set "
                'engine.type = "embedded"'
            )


EngineConfig = Annotated[EmbeddedEngineConfig | VLLMEngineConfig, Field(discriminator="type")]
