"""GGUF files, which transformers reads three times: for the tokenizer, for the config and for the weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CACHED = ("GGUFReader", "get_tensor_name_map")


@contextmanager
def read_once(given: dict[str, Any]) -> Iterator[None]:
    """Keep what the package gguf has read or built inside the block: a file's 100,000 strings, and a table of names.

    transformers asks for that table once per module of the model. Without this, SmolLM2-135M takes twice as long to load.

    Args:
        given: arguments for transformers, empty unless they name a GGUF file.
    """
    if not given:
        yield
        return
    import gguf

    before = {name: getattr(gguf, name) for name in CACHED}
    for name, original in before.items():
        setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(gguf, name, original)
