"""What a recipe samples with, and how long it may get."""

from __future__ import annotations

from deepgrpo import engines
from deepgrpo.config import Config, PretrainedModel
from deepgrpo.engines.base import Engine
from deepgrpo.errors import ModelError
from deepgrpo.explore.base import Limits
from deepgrpo.model.policy import Policy


def build_engine(config: Config, policy: Policy) -> Engine:
    """What samples from `policy`, whose weights it uses as they are at each call. Its caller closes it."""
    return engines.build_engine(
        config.engine, policy, dtype=config.engine_dtype, longest=response_limits(config, policy).max_total_tokens,
        trust_remote_code=isinstance(config.model, PretrainedModel) and config.model.trust_remote_code,
    )  # fmt: skip


def response_limits(config: Config, policy: Policy) -> Limits:
    """How long responses may get: the recipe's wish within the model's context."""
    sampling = config.sampling
    total = sampling.max_total_tokens or policy.context
    if total > policy.context:
        raise ModelError(
            f"sampling.max_total_tokens is {total}, but the model's context is {policy.context}; lower it"
        )
    return Limits(sampling.max_new_tokens, total)
