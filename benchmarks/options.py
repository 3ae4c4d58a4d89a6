"""Options of `python -m benchmarks`, parsed before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class BenchOptions:
    """Time a part of a training step, side by side with other ways of doing it."""

    part: Annotated[Literal["learner", "logprobs", "sampling", "step", "distribution", "busy"], tyro.conf.Positional]
    """What to time:
    learner: one update, a row per path or packs of trees
    logprobs: log-probs and their gradient, whole or in chunks
    sampling: rollouts and branches; ours, transformers, vLLM
    step: a whole step; ours, the reference's, TRL's
    distribution: a cluster with 1, 2 and 4 workers
    busy: a whole step, on a quiet and on a busy machine
    """
    workload: Literal["S", "L", "V", "D"] = "S"
    """S: rollouts of 256 tokens. L: of 1,024. V: a vocabulary of 151,936. D: SmolLM2-135M, 8 prompts."""
    repeats: int = 5
    """Rounds through all arms."""
    warmup: int = 1
    """Rounds before them that are not counted."""
    threads: int = 2
    """CPU threads of torch."""
    budget: int = 4096
    """Token budget of a forward pass of the learner."""
    arms: tuple[str, ...] = ()
    """Only these arms (default: all that can be had, but for hf_continuous and trl_grpo_continuous)."""
    memory: bool = True
    """Run each arm once more, in a process of its own, for its peak of memory."""
    vllm_python: Path | None = None
    """Interpreter of an environment with vLLM, for the arm vllm_bf16 (default: $DEEPGRPO_VLLM_PYTHON)."""
    json: Path | None = None
    """Write the figures to this file."""
    models: tuple[Literal["demo", "smollm2"], ...] = ("demo", "smollm2")
    """busy: the models."""
    neighbours: int = 1
    """busy: processes beside the step."""
    changes: dict[str, str] = field(default_factory=dict)
    """busy: changes to the recipes, as KEY VALUE pairs."""
    page: Path | None = None
    """busy: write the tables into this page."""
