"""Load a policy: from a directory, the hub, an installed package or a GGUF file, or from scratch with random weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepgrpo.config import PretrainedModel, ScratchModel
from deepgrpo.errors import ModelError, first_line
from deepgrpo.model.adapters import add_adapters
from deepgrpo.model.device import moved
from deepgrpo.model.directory import require_weights
from deepgrpo.model.gguf_file import read_once
from deepgrpo.model.locate import locate
from deepgrpo.model.narrow import stored_dtype
from deepgrpo.model.policy import Policy
from deepgrpo.model.shape import shape_of
from deepgrpo.model.soundness import freeze_other_parts, require_all_weights, require_causal, require_own_tokens
from deepgrpo.progress import is_shown, phase


def load_policy(
    config: PretrainedModel, *, device: str = "cpu", dtype: str = "float32", logprob_chunk: int = 256
) -> Policy:
    """Load a pretrained model and its tokenizer. New adapters are drawn from torch's global random stream.

    Raises ModelError if the directory is missing, has no tokenizer or no model that transformers knows; MissingExtraError
    if peft or gguf is required and not installed.
    """
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # a progress bar would clutter a log file
    path, gguf = locate(config)
    with read_once(gguf):
        return _load_policy(config, path, gguf, device, dtype, logprob_chunk)


def _load_policy(
    config: PretrainedModel, path: str, gguf: dict[str, Any], device: str, dtype: str, logprob_chunk: int
) -> Policy:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(config)
    said = f"model.path = {config.path!r}"
    if Path(path).is_dir() and not gguf:
        require_weights(Path(path), said)
    frozen = frozen_dtype(config)
    try:
        if gguf:
            from transformers import GgufConfig

            gguf["quantization_config"] = GgufConfig(dequantize=True)
        # the hub's own bars show a download
        with phase("loading the model", live=Path(path).is_dir()), _weights_counted():
            model, info = AutoModelForCausalLM.from_pretrained(
                path, dtype=frozen, output_loading_info=True, ignore_mismatched_sizes=True, **code_options(config),
                **gguf,
            )  # fmt: skip
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged config or a model's own code may raise anything
        raise loading_error(config, path, error) from error
    require_all_weights(model, said, info)
    if gguf:
        # the weights are plain tensors now; a saved checkpoint must not ask for GGUF again
        model.config.quantization_config = None
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
    disable_dropout(model)
    freeze_other_parts(model)
    if config.lora:
        model = add_adapters(model, config, frozen)
    policy = Policy(
        moved(model, device), tokenizer, context_length(model.config, tokenizer), getattr(torch, dtype), logprob_chunk
    )
    require_causal(policy.causal, said)
    require_own_tokens(policy, said)
    return policy


@contextmanager
def _weights_counted() -> Iterator[None]:
    """Show the weights that transformers has loaded as a phase of ours in place of its own bar."""
    from transformers.utils.logging import set_tqdm_hook

    def counted(every: Collection[Any], what: str) -> Iterator[Any]:
        with phase(what, len(every)) as advance:
            for each in every:
                yield each
                advance()

    def hook(bar: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if len(given) == 1 and isinstance(given[0], Collection):
            return counted(given[0], named.get("desc", "Loading").lower())
        return bar(*given, **named)

    before = set_tqdm_hook(hook if is_shown() else None)
    try:
        yield
    finally:
        set_tqdm_hook(before)


def scratch_policy(
    config: ScratchModel, tokenizer: Any, *, seed: int, device: str = "cpu", dtype: str = "float32",
    logprob_chunk: int = 256,
) -> Policy:  # fmt: skip
    """Build a Llama-shaped model with random weights for a given tokenizer. The same seed gives the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=config.max_position,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(settings)
    return Policy(moved(model, device), tokenizer, config.max_position, getattr(torch, dtype), logprob_chunk)


def load_tokenizer(config: PretrainedModel) -> Any:
    """Load the tokenizer of a pretrained model, without the model. Raises ModelError if it is missing or has no EOS token."""
    from transformers import AutoTokenizer

    path, gguf = locate(config)
    tokenizer_path = config.tokenizer or path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            tokenizer_path, trust_remote_code=config.trust_remote_code, **({} if config.tokenizer else gguf)
        )
    except Exception as error:  # a damaged file may raise anything
        _refuse_remote_code(config, error)
        _try_config(config, path, gguf)
        if not Path(tokenizer_path).is_dir():
            key = "model.tokenizer" if config.tokenizer else "model.path"
            raise ModelError(
                f"{key} = {tokenizer_path!r} is no directory here, and nothing could be loaded from the hub under that name "
                f"({first_line(error)}); check the path, or the hub name and the network"
            ) from error
        raise ModelError(
            f"no tokenizer could be loaded from {tokenizer_path!r} ({first_line(error)}); a model directory needs "
            "tokenizer.json or an equivalent: save one there, or name another source with model.tokenizer"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {tokenizer_path!r} has no EOS token, so no response could ever end; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def context_length(model_config: Any, tokenizer: Any) -> int:
    """Longest prompt plus response of a model, in tokens."""
    # tokenizers without a limit report 1e30
    return shape_of(model_config).context or int(min(tokenizer.model_max_length, 2**20))


def came_in(config: PretrainedModel) -> torch.dtype:
    """The dtype in which a pretrained model is stored; float32 for GGUF. Raises ModelError if it has no readable config."""
    from transformers import AutoConfig

    path, gguf = locate(config)
    if gguf:
        return torch.float32
    try:
        return stored_dtype(path, AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code))
    except Exception as error:  # a damaged config may raise anything
        raise loading_error(config, path, error) from error


def frozen_dtype(config: PretrainedModel) -> torch.dtype:
    """The dtype in which the frozen matrices of a model are stored: float32 without adapters, as then all are trained."""
    if config.lora is None:
        return torch.float32
    if config.lora.base_dtype == "auto":
        return came_in(config)
    named: torch.dtype = getattr(torch, config.lora.base_dtype)
    return named


def code_options(config: PretrainedModel) -> dict[str, Any]:
    """Keyword arguments of transformers that select the model's code, with or without weights."""
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    return {"trust_remote_code": config.trust_remote_code, **attention}


def loading_error(config: PretrainedModel, path: str, error: Exception) -> ModelError:
    """Turn transformers' loading error into a ModelError with the remedy."""
    _refuse_remote_code(config, error)
    if "Unrecognized configuration class" in str(error) and (found := _kind_of(path)):
        return ModelError(
            f"model.path = {config.path!r} is a {found}, which transformers does not load as a causal language model of text "
            "alone; name one, such as the text-only model of the same family"
        )
    wanted = config.attn_implementation or ""
    if "flash" in wanted and isinstance(error, ImportError):
        return ModelError(
            f'model.attn_implementation is "{wanted}", which cannot be used here ({first_line(error)}); on an NVIDIA GPU with '
            "a CUDA compiler run: pip install flash-attn --no-build-isolation; elsewhere leave the key out: the default needs "
            "no package"
        )
    said = " ".join(str(error).split("\n")[:2])  # where transformers checks a config, the second line has the cause
    return ModelError(
        f"no causal language model could be loaded from {path!r} ({' '.join(said.split())[:300] or type(error).__name__}); "
        "model.path must be a directory with config.json and safetensors, or a hub name"
    )


def _try_config(config: PretrainedModel, path: str, gguf: dict[str, Any]) -> None:
    """Raise ModelError if a directory's config.json cannot be read, which a tokenizer's error would not say."""
    from transformers import AutoConfig

    if config.tokenizer or gguf or not Path(path).is_dir():
        return
    try:
        AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise loading_error(config, path, error) from error


def _kind_of(path: str) -> str:
    """Architecture and model type in a directory's config.json; empty if it has none."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        return f"{(config.get('architectures') or ['model'])[0]} (model_type {config['model_type']!r})"
    except (OSError, ValueError, KeyError, AttributeError, TypeError, IndexError):
        return ""


def disable_dropout(model: nn.Module) -> None:
    """Disable dropout permanently: two passes over the same tokens must give the same log-probs (docs/details.md 18)."""
    config: Any = model.config
    for owner in (config, *model.modules()):
        if isinstance(owner, nn.Dropout):
            owner.p = 0.0
        # many families store the rate as a number and call F.dropout: dropout, attention_dropout, resid_pdrop, layerdrop
        for name, value in vars(owner).items():
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name or "layerdrop" in name):
                setattr(owner, name, 0.0)


def _refuse_remote_code(config: PretrainedModel, error: Exception) -> None:
    """Raise our ModelError if loading failed because the model ships its own code."""
    if not config.trust_remote_code and "trust_remote_code" in str(error):
        raise ModelError(
            f"model.path = {config.path!r} brings Python code of its own, which is not run unless you allow it; read that "
            "code, and if you trust it set model.trust_remote_code = true"
        ) from error
