"""Sizes of a model, read from its config: those of the language model where it has other parts, such as a vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes that memory and caches depend on.

    Example: ModelShape(layers=30, hidden=576, vocabulary=49152, heads=9, kv_heads=3, head_dim=64, intermediate=1536,
    context=8192).
    """

    layers: int
    hidden: int
    vocabulary: int
    heads: int
    """Attention heads; 0 for a model without attention."""
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width inside the feed-forward layers; the largest, where layers differ."""
    context: int | None
    """Longest prompt plus response, in tokens; None if the config does not limit it."""


def shape_of(config: Any) -> ModelShape:
    """Read the sizes of a transformers config."""
    text = text_config(config)
    hidden = _number(text, "hidden_size") or 1
    heads = _number(text, "num_attention_heads") or 0
    return ModelShape(
        layers=_number(text, "num_hidden_layers") or 1,
        hidden=hidden,
        vocabulary=_number(text, "vocab_size") or 1,
        heads=heads,
        kv_heads=_number(text, "num_key_value_heads") or heads,
        head_dim=_number(text, "head_dim") or (hidden // heads if heads else 0),
        intermediate=_number(text, "intermediate_size") or 4 * hidden,
        context=_number(text, "max_position_embeddings"),
    )


def text_config(config: Any) -> Any:
    """The config of the language model inside a config of several parts; a config of one part is its own."""
    try:
        return config.get_text_config()
    except (ValueError, AttributeError):  # several language models
        return config


def text_part(causal: Any) -> Any:
    """The language model inside a model of several parts, without its output layer; a model of one part is its own."""
    several = text_config(causal.config) is not causal.config and hasattr(causal.base_model, "get_decoder")
    return causal.base_model.get_decoder() if several else causal


def _number(config: Any, name: str) -> int | None:
    """A positive integer of the config, the largest of a list with one per layer; None if there is none."""
    value = getattr(config, name, None)
    values = value if isinstance(value, list | tuple) else [value]
    return max((v for v in values if type(v) is int and v > 0), default=None)
