"""What a run would do and need, without training: resolved recipe, one prompt, tokens per step, memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deepgrpo.config import Config, EmbeddedEngine, VLLMEngine, to_toml
from deepgrpo.explore import build_strategy
from deepgrpo.explore.base import Strategy
from deepgrpo.model.policy import Policy
from deepgrpo.prompts.source import Cursor, build_source
from deepgrpo.prompts.tasks import build_task
from deepgrpo.records import Prompt
from deepgrpo.rewards.base import build_reward
from deepgrpo.train.engine import response_limits
from deepgrpo.train.setup import build_policy, held_out, open_checkpoints, refuse_used
from deepgrpo.train.signals import build_signals

GIB = 1024**3


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


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by use, on the device. Activations are a rule of thumb (per token and layer 12 values
    of the hidden size and 4 of the feed-forward size, plus the chunk of logits); measure before you rely on them.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    engine: int
    """The engine's copy of the weights, if it has one: in bfloat16, or in vLLM's process."""
    cache: int
    kept: int
    """Rollouts that later rounds come back to, at most; 0 where there are none."""
    activations: int

    @property
    def total(self) -> int:
        # sampling and learning take turns: what the engine holds and the activations are not there at the same time
        sampling = self.cache + self.kept
        held = self.weights + self.gradients + self.optimizer + self.reference + self.engine
        return held + max(sampling, self.activations)


def estimate_memory(config: Config, policy: Policy, strategy: Strategy, slot_length: int) -> MemoryEstimate:
    """From the shape of the model; `slot_length` is the longest prompt plus response."""
    shape: Any = policy.causal.config.get_text_config()
    every = sum(p.numel() for p in policy.model.parameters())
    trained = sum(p.numel() for p in policy.trainable().values())
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or hidden // shape.num_attention_heads
    value = 2 if config.learner.dtype == "bfloat16" else 4
    stored = 2 if config.engine_dtype == "bfloat16" else 4
    intermediate = getattr(shape, "intermediate_size", None) or 4 * hidden
    kept = 2 if config.learner.gradient_checkpointing else 12 + 4 * intermediate // hidden
    tokens = config.learner.token_budget
    adapters = trained < every
    # logits, their softmax and its gradient; all rows of a pass at once where the head is not known
    rows = config.learner.logprob_chunk if policy.plain_head else tokens
    per_token = layers * 2 * heads * width * stored
    rollouts = config.run.prompts_per_step * config.explore.num_rollouts
    keeps = strategy.returns(0) and policy.plain_head
    engine = config.engine
    own = isinstance(engine, EmbeddedEngine)
    keep_bytes = engine.keep_mb * 2**20 if isinstance(engine, EmbeddedEngine) else 0
    # vLLM has its own copy in any dtype, and takes its cache as a whole
    given = int((engine.kv_cache_gb or 0) * GIB) if isinstance(engine, VLLMEngine) else 0
    return MemoryEstimate(
        weights=4 * every,
        gradients=4 * trained,
        optimizer=8 * trained,
        reference=4 * every if config.loss.beta > 0 and not adapters else 0,
        engine=stored * every if stored == 2 or not own else 0,
        cache=given or config.engine.max_rows * slot_length * per_token,
        # keys, values and last hidden states, up to engine.keep_mb
        kept=min(keep_bytes, rollouts * slot_length * (per_token + hidden * stored)) if keeps else 0,
        activations=tokens * layers * hidden * kept * value + 3 * rows * shape.vocab_size * 4
        + (min(config.learner.logprob_keep_mb * 2**20, tokens * shape.vocab_size * 4) if policy.plain_head else 0),
    )


def dry_run(config: Config, console: Console | None = None) -> None:
    """Load everything that a run needs, show what it would do, and train nothing.

    Raises what the run itself would raise before its first step: ConfigError, DataError, ModelError.
    """
    out = console or Console(highlight=False)
    directory = Path(config.run.dir) / config.run.name
    refuse_used(directory, open_checkpoints(config, directory))
    policy = build_policy(config)
    limits = response_limits(config, policy)
    source = build_source(config.data, policy.tokenizer, seed=config.run.seed, context=limits.max_total_tokens)
    task = build_task(config.data)
    reward = build_reward(config.reward, task)
    eval_prompts, eval_reward = held_out(config, policy, limits, reward)
    for each in {id(reward): reward, id(eval_reward): eval_reward}.values():
        each.close()
    strategy = build_strategy(config.explore, scale=config.credit.scale, tokenizer=policy.tokenizer, task=task)
    build_signals(policy, strategy)  # refuses a model that cannot tell what the strategy wants to know
    (prompt,), _ = source.take(Cursor(), 1)
    out.print("resolved recipe", style="bold")
    out.print(escape(to_toml(config)), soft_wrap=True)
    _show_prompt(out, prompt)
    tokens = estimate_tokens(config)
    slot = min(limits.max_total_tokens, len(prompt.tokens) + limits.max_new_tokens)
    memory = estimate_memory(config, policy, strategy, slot)
    table = Table(title="one step, at most", title_justify="left", show_header=False)
    size = "endless" if source.size is None else f"{source.size:,}"
    table.add_row("prompts in the data", size)
    if config.eval.every:
        table.add_row("prompts of an evaluation", f"{len(eval_prompts):,}")
    for reason, count in source.skipped.items():
        table.add_row(f"rows skipped: {reason}", f"{count:,}")
    table.add_row("sampled tokens, main stream", f"{tokens.main:,}")
    table.add_row("sampled tokens, branch stream", f"{tokens.branches:,}")
    table.add_row("sampled tokens, whole run", f"{tokens.total * config.run.steps:,}")
    for name in ("weights", "gradients", "optimizer", "reference", "engine", "cache", "kept", "activations", "total"):
        label = {"kept": "kept rollouts, at most", "engine": "weights of the engine"}.get(name, name)
        table.add_row(f"memory, {label}", f"{getattr(memory, name) / GIB:,.2f} GiB")
    out.print(table)
    out.print("dry run: nothing was trained")


def _show_prompt(out: Console, prompt: Prompt) -> None:
    out.print(f"prompt {prompt.id!r}, {len(prompt.tokens)} tokens", style="bold", markup=False)
    out.print(escape(prompt.text), soft_wrap=True)
    if prompt.answer is not None:
        out.print(f"answer: {prompt.answer}", markup=False)
    out.print("")
