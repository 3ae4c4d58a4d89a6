"""A tiny random language model on disk, with a tokenizer that takes any text and has a chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from surroundings import ROOT

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


SHARED_DATA = ROOT / "shared" / "data"
"""Real data sets beside the checkout, where there are any; tests that want them skip otherwise."""


def byte_tokenizer() -> Any:
    """One token per byte, `<pad>` and `<eos>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT)


def save_model(
    directory: Path, family: Literal["llama", "qwen2"] = "llama", width: int = 32, dtype: str = "float32"
) -> str:  # fmt: skip
    """Write a model of 0.03M parameters and its tokenizer in the Hugging Face layout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    tokenizer = byte_tokenizer()
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape)) if family == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any] | bytes]) -> str:
    """A row of bytes is written as it stands."""
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return str(path)
