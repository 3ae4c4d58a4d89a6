"""A policy without weights: the model of a recipe built from its config alone, on torch's meta device.

It has every parameter's name and shape, so it can be counted, and modules can be looked up in it. A model of 70 billion
parameters takes seconds and next to no memory. It cannot compute: what is asked of its weights is taken from its form.
"""

from __future__ import annotations

from typing import Any

import torch

from deepgrpo.config import ModelConfig, ScratchModel
from deepgrpo.model.policy import (
    Policy,
    code_options,
    context_of,
    locate,
    no_model,
    scratch_policy,
    with_adapters,
    without_dropout,
)


def build_meta_policy(
    config: ModelConfig, tokenizer: Any, *, dtype: str = "float32", logprob_chunk: int = 256
) -> Policy | None:
    """The policy of a recipe as far as its config tells.

    Args:
        config: the section `model`.
        tokenizer: of the model.
        dtype: of the arithmetic.
        logprob_chunk: rows of logits that exist at a time.

    Returns:
        a policy whose parameters have shapes and no values; None if the config does not tell: weights that are stored
        quantized have other sizes, and a model's own code may refuse to be built without values.

    Raises ModelError if there is no config, or of a kind that transformers does not know.
    """
    if isinstance(config, ScratchModel):
        with torch.device("meta"):
            return scratch_policy(config, tokenizer, seed=0, device="meta", dtype=dtype, logprob_chunk=logprob_chunk)
    from transformers import AutoConfig, AutoModelForCausalLM

    path, gguf = locate(config)
    try:
        shape = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code, **gguf)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise no_model(config, path, error) from error
    if getattr(shape, "quantization_config", None) is not None:
        return None
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, **code_options(config))
    except Exception:  # whatever a model's own code raises: loading it will tell what is wrong, if anything is
        return None
    without_dropout(model)
    if config.lora:
        with torch.device("meta"):
            model = with_adapters(model, config)
    return Policy(model, tokenizer, context_of(model.config, tokenizer), getattr(torch, dtype), logprob_chunk)
