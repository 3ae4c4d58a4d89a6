"""What a run would do and need, without training: resolved recipe, one prompt, tokens per step, memory (`memory.py`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepgrpo.config import Config, to_toml
from deepgrpo.errors import ModelError
from deepgrpo.explore import build_strategy
from deepgrpo.explore.base import Context
from deepgrpo.model.device import resolve_device
from deepgrpo.prompts.source import Cursor, build_source
from deepgrpo.prompts.tasks import build_task
from deepgrpo.records import Prompt
from deepgrpo.rewards.base import build_reward
from deepgrpo.train.engine import response_limits
from deepgrpo.train.memory import GIB, Counts, Holder, check_room, estimate_cluster, estimate_memory
from deepgrpo.train.setup import build_policy, held_out, open_checkpoints, outline_of, refuse_used
from deepgrpo.train.signals import build_signals


@dataclass(frozen=True, slots=True)
class TokenEstimate:
    """Most tokens of one step; a response that ends early costs less.

    Example: 64 prompts × 8 rollouts × 512 tokens = 262,144 in the main stream.
    """

    main: int
    branches: int
    """If every rollout is expanded, each branch as long as a response may be."""

    @property
    def total(self) -> int:
        return self.main + self.branches


def estimate_tokens(config: Config) -> TokenEstimate:
    explore = config.explore
    rollouts = config.run.prompts_per_step * explore.num_rollouts
    longest = config.sampling.max_new_tokens
    return TokenEstimate(rollouts * longest, rollouts * explore.most_branches * longest)


def dry_run(config: Config, console: Console | None = None) -> None:
    """Show what a run would do, and train nothing. Of the model only config and tokenizer are read, as long as they tell.

    Raises what the run itself would raise before its first step, what only weights can tell aside: ConfigError, DataError,
    ModelError.
    """
    out = console or Console(highlight=False)
    directory = Path(config.run.dir) / config.run.name
    refuse_used(directory, open_checkpoints(config, directory))
    device = _device(config)
    policy = outline_of(config) or build_policy(config, "cpu")
    limits = response_limits(config, policy)
    source = build_source(config.data, policy.tokenizer, seed=config.run.seed, context=limits.max_total_tokens)
    task = build_task(config.data)
    reward = build_reward(config.reward, task)
    eval_prompts, eval_reward = held_out(config, policy, limits, reward)
    for each in {id(reward): reward, id(eval_reward): eval_reward}.values():
        each.close()
    strategy = build_strategy(config.explore, Context(config.credit.scale, policy.tokenizer, task))
    build_signals(policy, strategy)  # refuses a model that cannot tell what the strategy wants to know
    (prompt,), _ = source.take(Cursor(), 1)
    out.print("resolved recipe", style="bold")
    out.print(escape(to_toml(config)), soft_wrap=True)
    _show_prompt(out, prompt)
    tokens = estimate_tokens(config)
    table = Table(title="one step, at most", title_justify="left", show_header=False)
    counts = Counts.of(policy)
    trained = "" if counts.trained == counts.every else f", {counts.trained / 1e6:,.2f}M of them trained"
    table.add_row("parameters", f"{counts.every / 1e6:,.2f}M{trained}")
    size = "endless" if source.size is None else f"{source.size:,}"
    table.add_row("prompts in the data", size)
    if config.eval.every:
        table.add_row("prompts of an evaluation", f"{len(eval_prompts):,}")
    for reason, count in source.skipped.items():
        table.add_row(f"rows skipped: {reason}", f"{count:,}")
    table.add_row("sampled tokens, main stream", f"{tokens.main:,}")
    table.add_row("sampled tokens, branch stream", f"{tokens.branches:,}")
    table.add_row("sampled tokens, whole run", f"{tokens.total * config.run.steps:,}")
    slot = min(limits.max_total_tokens, len(prompt.tokens) + limits.max_new_tokens)
    if config.cluster is None:
        memory = estimate_memory(config, policy, strategy, slot)
        for name in USES:
            if size_of := getattr(memory, name):
                table.add_row(f"memory, {USES[name]}", _gib(size_of))
        out.print(table)
        if device is not None:
            try:
                check_room(config, policy, device)
            except ModelError as error:
                out.print(f"it does not fit here: {error}", markup=False, soft_wrap=True)
    else:
        out.print(table)
        _show_holders(out, estimate_cluster(config, policy, strategy, slot))
    out.print("dry run: nothing was trained")


USES = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "reference": "reference",
    "engine": "weights of the engine", "transfer": "file of weights for vLLM", "stored": "weights for the workers",
    "cache": "cache", "kept": "kept rollouts, at most", "gathered": "gathered from shards", "activations": "activations",
    "start": "while it starts", "total": "total",
}  # fmt: skip
"""Name in `MemoryEstimate` → as it is shown."""


def _device(config: Config) -> str | None:
    """The device of a run in one process; None if it is not here, or there are several processes.

    A run for a GPU may be looked at without one. Raises ConfigError for a name that no machine has.
    """
    elsewhere = config.cluster is not None or not torch.cuda.is_available()
    if elsewhere and re.fullmatch(r"cuda(:\d+)?", config.run.device):
        return None
    device = resolve_device(config.run.device)
    return device if config.cluster is None else None


def _show_holders(out: Console, holders: Sequence[Holder]) -> None:
    """A block of rows for each kind of process and memory."""
    table = Table(title="memory of each process, at most", title_justify="left", show_header=False)
    for holder in holders:
        number = "on every node" if holder.count is None else f"{holder.count} of them"
        table.add_section()
        table.add_row(f"{holder.name}, {holder.memory}", number)
        for name, label in USES.items():
            if size := getattr(holder.estimate, name):
                table.add_row(f"  {label}", _gib(size))
    out.print(table)


def _gib(count: int) -> str:
    return f"{count / GIB:,.2f} GiB"


def _show_prompt(out: Console, prompt: Prompt) -> None:
    out.print(f"prompt {prompt.id!r}, {len(prompt.tokens)} tokens", style="bold", markup=False)
    out.print(escape(prompt.text), soft_wrap=True)
    if prompt.answer is not None:
        out.print(f"answer: {prompt.answer}", markup=False)
    out.print("")
