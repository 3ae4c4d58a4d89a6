"""A policy from the model and the tokenizer of the Python program that trains."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from deepgrpo.config import GivenModel
from deepgrpo.errors import ModelError
from deepgrpo.loading import not_given
from deepgrpo.model.adapters import add_adapters, has_adapters, store_frozen
from deepgrpo.model.device import moved
from deepgrpo.model.loading import context_length, disable_dropout
from deepgrpo.model.narrow import dtype_in, is_narrow, plain_again
from deepgrpo.model.policy import Policy
from deepgrpo.model.soundness import freeze_other_parts, require_causal, require_own_tokens


def given_policy(config: GivenModel, *, device: str = "cpu", dtype: str = "float32", logprob_chunk: int = 256) -> Policy:
    """Make a policy of the model that the section holds, in place: float32, on the device, without dropout.

    Under adapters its frozen matrices keep the dtype that they have.

    Raises ModelError if it cannot be trained, ConfigError if the section holds none.
    """
    if config.held is None:
        raise not_given("model.type", config.name)
    model, tokenizer = config.held
    _check(model, tokenizer)
    causal = model.get_base_model() if has_adapters(model) else model
    disable_dropout(causal)
    freeze_other_parts(causal)
    if config.lora:
        wanted = config.lora.base_dtype
        model = add_adapters(model, config, dtype_in(causal) if wanted == "auto" else getattr(torch, wanted))
    elif has_adapters(model):
        store_frozen(model, "auto", dtype_in(causal))
    model = moved(model if is_narrow(model) else model.float(), device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(f"model: no parameter of the {type(model).__name__} requires a gradient; call requires_grad_(True)")
    policy = Policy(model, tokenizer, context_length(causal.config, tokenizer), getattr(torch, dtype), logprob_chunk)
    require_causal(policy.causal, "model")
    require_own_tokens(policy, "model")
    return policy


def _check(model: Any, tokenizer: Any) -> None:
    kind = type(model).__name__
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise ModelError(f"model is a {kind}; pass a causal language model of transformers, or its name as a text")
    if getattr(model, "is_quantized", False):
        raise ModelError(f"model: the {kind} is quantized, and training needs float32; load it without quantization_config")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ModelError(f"model: the {kind} is spread over several devices; load it without device_map, onto one")
    if not hasattr(tokenizer, "decode") or not hasattr(tokenizer, "save_pretrained"):
        raise ModelError(f"tokenizer is a {type(tokenizer).__name__}; pass the model's own, e.g. of AutoTokenizer")
    if tokenizer.eos_token_id is None:
        raise ModelError("tokenizer has no EOS token, so no response could ever end; set tokenizer.eos_token")


def digest_of(model: Any, tokenizer: Any) -> str:
    """Digest of the names and shapes of a model's parameters and of a tokenizer's tokens and chat template; not of weights."""
    found = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)}\n".encode())
    for token, number in sorted(tokenizer.get_vocab().items()):
        found.update(f"{number} {token}\n".encode(errors="surrogatepass"))
    found.update(repr(getattr(tokenizer, "chat_template", None)).encode(errors="surrogatepass"))
    return found.hexdigest()


@contextlib.contextmanager
def handed_back(model: Any) -> Iterator[None]:
    """Give a model its attention function, its mode and its frozen parameters back after a run; the weights stay trained."""
    causal = model.get_base_model() if has_adapters(model) else model
    attention, training, dtype = causal.config._attn_implementation, model.training, dtype_in(causal)
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        if causal.config._attn_implementation != attention:
            causal.set_attn_implementation(attention)
        model.train(training)
        if is_narrow(causal):  # its norms came in 16 bits as well
            plain_again(causal)
            for parameter in causal.parameters():
                if not parameter.requires_grad and parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen.get(name, parameter.requires_grad))
            parameter.grad = None
