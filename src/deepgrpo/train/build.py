"""Build a recipe's policy, its weightless copy for counting, its sampling engine and its length limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from deepgrpo import engines
from deepgrpo.config import (
    Config,
    GeneratedData,
    GivenModel,
    LearnerConfig,
    PretrainedModel,
    SamplingConfig,
    ScratchModel,
)
from deepgrpo.engines.base import Engine
from deepgrpo.errors import ModelError
from deepgrpo.explore.base import Limits
from deepgrpo.model.device import resolve_device
from deepgrpo.model.given import given_policy
from deepgrpo.model.loading import load_policy, load_tokenizer, scratch_policy
from deepgrpo.model.meta_policy import build_meta_policy
from deepgrpo.model.policy import Policy
from deepgrpo.model.tree_gate import PackingVerdict
from deepgrpo.progress import phase
from deepgrpo.prompts import synthetic

SamplerBuilder = Callable[[Config, Policy], Engine]
"""Builds the engine that samples from a policy, with the signature of `build_sampler`; picklable if a cluster uses it."""


def build_policy(config: Config, device: str | None = None) -> Policy:
    """Load or create the recipe's policy on a device; default: that of `run.device`."""
    device = resolve_device(device or config.run.device)
    policy = _load_policy(config, device)
    _configure(policy, config.learner)
    if config.learner.tree_packing != "off":
        with phase("testing tree packs"):
            check_packing(config.learner.tree_packing, policy.try_tree_packing())
    return policy


def _load_policy(config: Config, device: str) -> Policy:
    learner = config.learner
    if isinstance(config.model, ScratchModel):
        return scratch_policy(
            config.model, scratch_tokenizer(config), seed=config.run.seed, device=device, dtype=learner.dtype,
            logprob_chunk=learner.logprob_chunk,
        )  # fmt: skip
    if isinstance(config.model, GivenModel):
        return given_policy(config.model, device=device, dtype=learner.dtype, logprob_chunk=learner.logprob_chunk)
    return load_policy(config.model, device=device, dtype=learner.dtype, logprob_chunk=learner.logprob_chunk)


def build_shapes(config: Config) -> Policy | None:
    """Build the recipe's policy without weights; None if its config alone does not determine it (`model/meta_policy.py`)."""
    model, learner = config.model, config.learner
    if isinstance(model, GivenModel):
        return None  # it is in memory already
    tokenizer = scratch_tokenizer(config) if isinstance(model, ScratchModel) else load_tokenizer(model)
    policy = build_meta_policy(model, tokenizer, dtype=learner.dtype, logprob_chunk=learner.logprob_chunk)
    if policy is not None:
        _configure(policy, learner)
    return policy


def scratch_tokenizer(config: Config) -> Any:
    """Build the tokenizer of a model from scratch: the characters of the recipe's synthetic task."""
    assert isinstance(config.data, GeneratedData)
    return synthetic.tokenizer(synthetic.alphabet(config.data))


def _configure(policy: Policy, learner: LearnerConfig) -> None:
    policy.logprob_keep = learner.logprob_keep_mb * 2**20
    if learner.gradient_checkpointing:
        policy.checkpoint_activations()


def check_packing(tree_packing: Literal["auto", "on", "off"], verdict: PackingVerdict) -> None:
    """Raise ModelError if the recipe requires tree packs and the model cannot be packed."""
    if not verdict.packs and tree_packing == "on":
        raise ModelError(
            f'learner.tree_packing is "on", but this model cannot be packed: {verdict.reason}; set it to "auto" or "off"'
        )


def build_sampler(config: Config, policy: Policy) -> Engine:
    """Build the recipe's engine, which samples from `policy` with its weights at each call. The caller closes it."""
    return engines.build_engine(
        config.engine, policy, dtype=config.engine_dtype,
        longest=response_limits(config.sampling, policy.context).max_total_tokens,
        trust_remote_code=isinstance(config.model, PretrainedModel) and config.model.trust_remote_code,
    )  # fmt: skip


def response_limits(sampling: SamplingConfig, context: int) -> Limits:
    """Return the length limits of responses: the recipe's, within the model's context of `context` tokens."""
    total = sampling.max_total_tokens or context
    if total > context:
        raise ModelError(f"sampling.max_total_tokens is {total}, but the model's context is {context}; lower it")
    return Limits(sampling.max_new_tokens, total)
