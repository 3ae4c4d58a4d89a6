"""Running out of memory in a step: which part of it, and the keys to lower, in the order in which they cost least."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from deepgrpo.config import Config, EmbeddedEngineConfig
from deepgrpo.errors import TrainingError, first_line

Part = Literal["sampling", "learning"]


@contextmanager
def shortage_explained(config: Config, step: int, part: Part) -> Iterator[None]:
    """Turn a shortage of memory, of the device or of the machine, into a TrainingError that names what to lower.

    What the failed part held is freed, so that the state before it can be saved.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        traceback.clear_frames(error.__traceback__)  # their variables are the activations
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        raise TrainingError(
            f"step {step}, {part}: out of memory ({first_line(error)}); {'; '.join(lowered(config, part))}; "
            "docs/gpu.md, Memory, has the rest"
        ) from error


def lowered(config: Config, part: Part) -> list[str]:
    """Changes of the recipe that save memory in a part of the step, the cheapest first."""
    learner, engine = config.learner, config.engine
    if part == "sampling":
        if not isinstance(engine, EmbeddedEngineConfig):
            return [f"lower engine.gpu_memory (now {engine.gpu_memory})"]
        return [f"lower engine.max_rows (now {engine.max_rows})", f"lower engine.keep_mb (now {engine.keep_mb})"]
    halved = max(learner.tokens_per_pack // 2, 1)
    changes = [f"set learner.tokens_per_pack = {halved} (now {learner.tokens_per_pack}; the gradient stays the same)"]
    if not learner.gradient_checkpointing:
        changes.append("set learner.gradient_checkpointing = true")
    if learner.dtype == "float32":
        changes.append('set learner.dtype = "bfloat16"')
    return changes
