"""Dry run: show the resolved recipe, one prompt, tokens per step and memory (`memory.py`), and train nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from deepgrpo.config import Config, to_toml
from deepgrpo.errors import ModelError, RewardError
from deepgrpo.explore.episodes import Episodes
from deepgrpo.model.device import resolve_device
from deepgrpo.prompts.source import Cursor
from deepgrpo.records import Prompt
from deepgrpo.rewards import build_reward
from deepgrpo.rewards.base import NeedsColumns, Reward
from deepgrpo.runs.layout import RunDir
from deepgrpo.terminal import Terminal
from deepgrpo.train.build import build_policy, build_shapes
from deepgrpo.train.counts import Counts
from deepgrpo.train.inputs import build_inputs
from deepgrpo.train.log import opening
from deepgrpo.train.memory import GIB, Holder, estimate_cluster, estimate_memory
from deepgrpo.train.origin import new_origin
from deepgrpo.train.room import check_room

CHECKED = 8
"""Prompts whose columns are checked against what the reward needs."""


@dataclass(frozen=True, slots=True)
class TokenEstimate:
    """Sampled tokens of one step, at most; responses that end early cost less.

    Example: 64 prompts × 8 rollouts × 512 tokens = 262,144 in the main stream.
    """

    main: int
    branches: int
    """If every rollout is expanded and every branch reaches the length limit."""
    answers: int = 0
    """If the strategy asks about every rollout."""

    @property
    def total(self) -> int:
        return self.main + self.branches + self.answers


def estimate_tokens(config: Config) -> TokenEstimate:
    explore = config.explore
    rollouts = config.run.prompts_per_step * explore.num_rollouts
    longest = config.sampling.max_new_tokens
    return TokenEstimate(
        rollouts * longest, rollouts * explore.most_branches * longest, rollouts * explore.most_asked_tokens
    )


def dry_run(config: Config, console: Console | None = None) -> None:
    """Show what a run would do, and train nothing. Weights are loaded only if config and tokenizer are not enough.

    Raises the errors that the run would raise before its first step, except those that depend on weights: ConfigError,
    DataError, ModelError; RewardError if the data lack a column that the reward needs.
    """
    out = console or Terminal()
    with opening():
        _dry_run(config, out)


def _dry_run(config: Config, out: Console) -> None:
    directory = RunDir.of(config.run).path
    new_origin(RunDir(directory), overwrite=config.run.overwrite)  # refuses a directory that holds a run
    device = _device(config.run.device, on_cluster=config.cluster is not None)
    policy = build_shapes(config) or build_policy(config, "cpu")
    inputs = build_inputs(config, policy)
    config, source, limits = inputs.config, inputs.source, inputs.limits
    reward = build_reward(config.reward, inputs.task)
    prompts, _ = source.take(Cursor(), CHECKED)
    _check_columns(reward, prompts)
    reward.close()
    _check_columns(inputs.eval_reward or reward, inputs.eval_prompts[:CHECKED], "eval.data: ")
    if inputs.eval_reward is not None:
        inputs.eval_reward.close()
    prompt = prompts[0]
    out.print("resolved recipe", style="bold")
    out.print(to_toml(config), markup=False, soft_wrap=True)
    _show_prompt(out, prompt)
    if inputs.episodes is not None:
        _show_reply(out, inputs.episodes, prompt)
    tokens = estimate_tokens(config)
    table = Table(title="one step, at most", title_justify="left", show_header=False)
    counts = Counts.of(policy)
    trained = "" if counts.trained == counts.every else f", {counts.trained / 1e6:,.2f}M of them trained"
    trained += f", {counts.narrow / 1e6:,.2f}M of them stored in 16 bits" if counts.narrow else ""
    table.add_row("parameters", f"{counts.every / 1e6:,.2f}M{trained}")
    size = "endless" if source.size is None else f"{source.size:,}"
    if not source.described.endswith(" prompts"):  # streamed or mixed
        size = source.described
    table.add_row("prompts in the data", size)
    if config.eval.scheduled:
        table.add_row("prompts of an evaluation", f"{len(inputs.eval_prompts):,}")
    for reason, count in source.skipped.items():
        table.add_row(f"rows skipped: {reason}", f"{count:,}")
    for reason, count in (inputs.eval_source.skipped if inputs.eval_source else {}).items():
        table.add_row(f"rows of eval.data skipped: {reason}", f"{count:,}")
    table.add_row("sampled tokens, main stream", f"{tokens.main:,}")
    table.add_row("sampled tokens, branch stream", f"{tokens.branches:,}")
    if tokens.answers:
        table.add_row("sampled tokens, answers about rollouts", f"{tokens.answers:,}")
    table.add_row("sampled tokens, whole run", f"{tokens.total * config.run.steps:,}")
    slot = min(limits.max_total_tokens, len(prompt.tokens) + limits.max_new_tokens)
    if config.cluster is None:
        memory = estimate_memory(config, policy, inputs.strategy, slot)
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
        _show_holders(out, estimate_cluster(config, policy, inputs.strategy, slot))
    out.print("dry run: nothing was trained")


USES = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "reference": "reference",
    "engine": "weights of the engine", "transfer": "file of weights for vLLM", "stored": "weights for the workers",
    "cache": "cache", "prefixes": "kept rollouts, at most", "gathered": "gathered from shards", "activations": "activations",
    "start": "while it starts", "total": "total",
}  # fmt: skip
"""Field of `MemoryEstimate` → label."""


def _check_columns(reward: Reward, prompts: Sequence[Prompt], where: str = "") -> None:
    """Raise RewardError if the prompts lack a column that the reward needs."""
    try:
        if isinstance(reward, NeedsColumns) and prompts:
            reward.check_prompts(prompts)
    except RewardError as error:
        raise RewardError(f"{where}{error}") from error


def _device(wanted: str, *, on_cluster: bool) -> str | None:
    """Return the device of a run in one process; None if it is not in this machine, or the run is on a cluster.

    A run for a GPU can be dry-run without one. Raises ConfigError for an invalid name.
    """
    if (on_cluster or not torch.cuda.is_available()) and re.fullmatch(r"(cuda|xpu)(:\d+)?|mps", wanted):
        return None
    device = resolve_device(wanted)
    return None if on_cluster else device


def _show_holders(out: Console, holders: Sequence[Holder]) -> None:
    """Print a block of rows for each kind of process and memory."""
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
    out.print(prompt.text, markup=False, soft_wrap=True)
    if prompt.answer is not None:
        out.print(f"answer: {prompt.answer}", markup=False)
    out.print("")


def _show_reply(out: Console, episodes: Episodes, prompt: Prompt) -> None:
    """Print an episode as the model would read it: a turn of the model, and the environment's reply to it."""
    environment = episodes.environment
    ends = environment.turn_ends[0] if environment.turn_ends else ""
    written = f"[the model's first turn]{ends}"
    if environment.tools():  # a call of no tool: nothing of the user's runs, and its reply shows the form
        written = '<tool_call>\n{"name": "none of these", "arguments": {}}\n</tool_call>'
    try:
        (state,) = episodes.start([prompt])
        (place,) = episodes.begin(prompt, state, 1)
        (turn,) = environment.step_all([(place.state, written)])
        episodes.end([turn.state])
        shown = "" if turn.done else episodes.decode(episodes.between(turn.observation, not ends))
    finally:
        environment.close()
    out.print("an episode, with a first turn that is no turn of a model", style="bold")
    out.print(f"{prompt.text}{written}{shown}", markup=False, soft_wrap=True)
    out.print("the episode ends there" if turn.done else "[the model's next turn]", markup=False)
    reward = "none" if turn.reward is None else f"{turn.reward:g}"
    out.print(f"reward of the turn: {reward}; calls of tools: {turn.calls}, failed: {turn.failed_calls}\n", markup=False)
