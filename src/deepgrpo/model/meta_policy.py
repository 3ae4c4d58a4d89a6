"""A policy without weights: the model of a recipe, built from its config alone on torch's meta device.

It has the name and shape of every parameter, so its parameters can be counted and its modules inspected. Building one of
70 billion parameters takes seconds and almost no memory. It cannot compute.
"""

from __future__ import annotations

from typing import Any

import torch

from deepgrpo.config import PretrainedModel, ScratchModel
from deepgrpo.model.adapters import add_adapters
from deepgrpo.model.loading import (
    code_options,
    context_length,
    disable_dropout,
    frozen_dtype,
    loading_error,
    scratch_policy,
)
from deepgrpo.model.locate import locate
from deepgrpo.model.policy import Policy
from deepgrpo.model.soundness import freeze_other_parts, require_decoder, require_own_tokens


def build_meta_policy(
    config: PretrainedModel | ScratchModel, tokenizer: Any, *, dtype: str = "float32", logprob_chunk: int = 256
) -> Policy | None:
    """Build the policy of a recipe from its config.

    Args:
        config: section `model` of the recipe.
        tokenizer: tokenizer of the model.
        dtype: dtype of the arithmetic.
        logprob_chunk: rows of logits held in memory at a time.

    Returns:
        a policy whose parameters have shapes and no values; None if the config does not determine the shapes: quantized
        weights have other sizes on disk, and a model's own code may need values to be built.

    Raises ModelError if there is no config, or transformers does not know its model type.
    """
    if isinstance(config, ScratchModel):
        with torch.device("meta"):
            return scratch_policy(config, tokenizer, seed=0, device="meta", dtype=dtype, logprob_chunk=logprob_chunk)
    from transformers import AutoConfig, AutoModelForCausalLM

    path, gguf = locate(config)
    try:
        shape = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code, **gguf)
    except Exception as error:  # a damaged config may raise anything
        raise loading_error(config, path, error) from error
    if getattr(shape, "quantization_config", None) is not None:
        return None
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, **code_options(config))
    except Exception:  # a model's own code may raise anything; loading the real model will report the cause
        return None
    disable_dropout(model)
    freeze_other_parts(model)
    require_decoder(model, f"model.path = {config.path!r}")
    if config.lora:
        with torch.device("meta"):
            model = add_adapters(model, config, frozen_dtype(config))
    policy = Policy(model, tokenizer, context_length(model.config, tokenizer), getattr(torch, dtype), logprob_chunk)
    require_own_tokens(policy, f"model.path = {config.path!r}")
    return policy
