"""Warm start: weights from another run, or supervised training on written solutions, before reinforcement.

A group in which every rollout fails carries no gradient, and a model from scratch always fails. A few hundred steps of
imitation bring it to where some rollouts succeed and some fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError

from deepgrpo import rng
from deepgrpo.config import GeneratedData, WarmstartConfig
from deepgrpo.errors import ConfigError, ModelError, first_line
from deepgrpo.eval.judging import Judge
from deepgrpo.model.adapters import has_adapters
from deepgrpo.model.directory import require_config
from deepgrpo.model.policy import Policy
from deepgrpo.pack.budget import pack_rows
from deepgrpo.pack.layout import Row
from deepgrpo.progress import Advance, phase
from deepgrpo.prompts import chain
from deepgrpo.prompts.lookup import Piece
from deepgrpo.prompts.source import Cursor, build_source
from deepgrpo.prompts.synthetic import build_synthetic
from deepgrpo.records import Prompt, SampleRequest
from deepgrpo.runs.weights import check_weights
from deepgrpo.train.setup import Run
from deepgrpo.train.start import save_start
from deepgrpo.train.stop import Stop


class Example(NamedTuple):
    """A written solution. Example: Example(context=(4, 4), target=(9, 7, 8, 1), given={1}) imitates 9, 8 and 1."""

    context: tuple[int, ...]
    """The prompt, and the beginning of a solution if its answer is asked early."""
    target: tuple[int, ...]
    """The tokens behind it, with EOS."""
    given: frozenset[int] = frozenset()
    """Places in `target` that are not imitated: observations of an environment."""


SEED_OFFSET = 1_000_003
"""Added to the seed of the data: the questions of the warm start are not those that are trained on later."""


def warm_start(run: Run, stop: Stop) -> None:
    """Do the warm start that the recipe asks for, and save its weights as the start of the run.

    Raises KeyboardInterrupt if it was stopped before its end: there is nothing to resume from.
    """
    config = run.config.warmstart
    assert config is not None
    if config.from_ is not None:
        load_from(run.policy, Path(config.from_))
    else:
        with phase("warm start", config.steps) as advance:
            imitated = imitate(
                run.policy, config, _examples(run), tokens_per_pack=run.config.learner.tokens_per_pack,
                check=lambda: sampled_accuracy(run), progress=_Told(run, config, advance), stop=lambda: stop.requested,
            )  # fmt: skip
        if imitated.stopped:
            run.log.note(
                f"stopped after step {imitated.steps} of the warm start, which was not finished: nothing was saved; start "
                f"the run anew with the same command, or with: {run.go_on}"
            )
            raise KeyboardInterrupt
        if said := missed(config, imitated.accuracy):
            run.log.warn(said)
    save_start(run.policy, run.paths)


def missed(config: WarmstartConfig, accuracy: float | None) -> str:
    """A warning if a warm start ended below its target; empty if not."""
    target = config.target_accuracy
    if target is None or accuracy is None or accuracy >= target:
        return ""
    return (
        f"the warm start ended after {config.steps} steps at a sampled accuracy of {accuracy:.1%}, short of "
        f"warmstart.target_accuracy = {target}; raise warmstart.steps, or try another warmstart.lr or run.seed: where hardly "
        "any rollout succeeds, reinforcement learns nothing"
    )


def load_from(policy: Policy, directory: Path) -> None:
    """Load weights that another run has saved. Raises ConfigError if there are none, ModelError if they do not fit."""
    remedy = "name the directory `start` of a run with a warm start, or a checkpoint's `model`"
    if not directory.is_dir():  # a missing directory must not be taken for a name on the hub
        raise ConfigError(f"warmstart.from is {str(directory)!r}, which is no directory here; {remedy}")
    check_weights(directory)
    try:
        if not has_adapters(policy.model):
            require_config(directory, "it")
    except ModelError as error:
        said = f"warmstart.from is {str(directory)!r}, but no weights can be read there ({error}); {remedy}"
        raise ConfigError(said) from None
    try:
        policy.load_weights(directory)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"warmstart.from is {str(directory)!r}, but no weights can be read there ({first_line(error)}); {remedy}"
        ) from error


def _examples(run: Run) -> Callable[[int, int], Sequence[Example]]:
    """(start, count) → that many questions of the training split with their written solutions.

    The stream has no end, also where `data.size` or `data.limit` fixes the questions of reinforcement: a few solutions would
    be learned by heart.
    """
    data, tokenizer = run.config.data, run.policy.tokenizer
    assert isinstance(data, GeneratedData) and run.config.warmstart
    early = run.config.warmstart.early_answers
    task = build_synthetic(data)
    source = build_source(
        data.model_copy(update={"seed": data.seed + SEED_OFFSET, "size": None, "limit": None}), tokenizer,
        seed=run.config.run.seed, context=run.policy.context,
    )  # fmt: skip

    def examples(start: int, count: int) -> list[Example]:
        prompts, _ = source.take(Cursor(position=start), count)
        return [example(p, start + i) for i, p in enumerate(prompts)]

    def example(prompt: Prompt, place: int) -> Example:
        asked, pieces = "", task.solution(prompt)
        chosen, where = rng.uniforms([rng.key("early answer", prompt.question, place)] * 2, range(2))
        if chosen < early:
            asked, answer = chain.asked_early("".join(piece.text for piece in pieces), where)
            pieces = [Piece(answer)]
        target: list[int] = []
        given: set[int] = set()
        for piece in pieces:
            tokens = encoded(piece.text)
            given.update(range(len(target), len(target) + len(tokens)) if piece.given else ())
            target += tokens
        return Example(prompt.tokens + encoded(asked), (*target, tokenizer.eos_token_id), frozenset(given))

    def encoded(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    return examples


@dataclass
class _Told:
    """Tells of the steps of an imitation: in a bar, and every `check_every` steps in the log."""

    run: Run
    config: WarmstartConfig
    advance: Advance
    measured: str = ""
    """The newest accuracy, for the bar."""

    def __call__(self, step: int, loss: float, accuracy: float | None) -> None:
        if accuracy is not None:
            self.measured = f"  accuracy {accuracy:.1%}"
        self.advance(1, f"loss {loss:.3f}{self.measured}")
        if accuracy is not None or step % self.config.check_every == 0:
            measured = "" if accuracy is None else f"  sampled accuracy {accuracy:.1%}"
            self.run.log.note(f"warm start {step}/{self.config.steps}  loss {loss:.3f}{measured}")


def sampled_accuracy(run: Run) -> float:
    """Mean reward of one sampled response per held-out prompt: `eval/sampled` with one sample, without the greedy pass."""
    run.learner.adopt()
    prompts, limits, seed = run.eval_prompts, run.limits, run.config.run.seed
    requests = [
        SampleRequest(
            p.tokens, (rng.key(seed, "eval", p.id, 0),), min(limits.max_new_tokens, limits.max_total_tokens - len(p.tokens))
        )
        for p in prompts
    ]  # fmt: skip
    judged = Judge(run.engine, run.eval_reward, run.policy.tokenizer, 0.0, episodes=run.episodes, voting=False)
    groups = judged(prompts, requests, run.sampling_params).groups
    return sum(only.score.judged for (only,) in groups) / len(groups)


# ---------------------------------------------------------------- imitation


@dataclass(frozen=True, slots=True)
class Imitated:
    """The outcome of an imitation. Example: Imitated(steps=400, stopped=False, accuracy=0.35)."""

    steps: int
    stopped: bool
    """True if it was stopped before its target accuracy or its last step."""
    accuracy: float | None = None
    """Sampled accuracy when it was last measured."""


def imitate(
    policy: Policy, config: WarmstartConfig, examples: Callable[[int, int], Sequence[Example]], *, tokens_per_pack: int,
    check: Callable[[], float] | None = None, progress: Callable[[int, float, float | None], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Imitated:  # fmt: skip
    """Minimize the cross-entropy of solution tokens; prompt tokens are not trained.

    AdamW with weight decay 0.01, a linear warm-up over a tenth of the steps, then a cosine to zero; gradient norm at most 1.

    Args:
        examples: (start, count) → that many examples, the same for the same arguments.
        check: measures the sampled accuracy, every `check_every` steps if there is a target.
        progress: gets (step, loss, accuracy or None) after each step.
        stop: read before each step; true ends the imitation.
    """
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=config.lr, weight_decay=0.01)
    policy.model.train()
    newest: float | None = None
    for step in range(config.steps):
        if stop():
            return Imitated(step, True, newest)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss = imitation_gradient(policy, examples(step * config.batch_size, config.batch_size), tokens_per_pack)
        torch.nn.utils.clip_grad_norm_(policy.trainable().values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        accuracy: float | None = None
        if check is not None and config.target_accuracy is not None and (step + 1) % config.check_every == 0:
            newest = accuracy = check()
            policy.model.train()
        if progress is not None:
            progress(step + 1, loss, accuracy)
        if accuracy is not None and config.target_accuracy is not None and accuracy >= config.target_accuracy:
            return Imitated(step + 1, False, newest)
    return Imitated(config.steps, False, newest)


def learning_rate(config: WarmstartConfig, step: int) -> float:
    """Learning rate of a step, from 0: linear warm-up over a tenth of the steps, then a cosine to zero."""
    warmup = max(1, config.steps // 10)
    done = max(0, step - warmup) / max(1, config.steps - warmup)
    return config.lr * min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * done))


def imitation_gradient(policy: Policy, batch: Sequence[Example], tokens_per_pack: int) -> float:
    """Accumulate the gradient of the mean loss per imitated token; return that loss in nats."""
    rows: list[Row] = []
    total = 0
    wanted: list[int] = []
    for context, target, given in batch:
        imitated = [i for i in range(len(target)) if i not in given]
        positions = len(context) - 1 + np.array(imitated)
        rows.append(Row(np.array(context + target, dtype=np.int64), positions, total + np.arange(len(imitated))))
        wanted += [target[i] for i in imitated]
        total = len(wanted)
    targets = torch.tensor(wanted, dtype=torch.int64)
    loss_sum = 0.0
    for pack in pack_rows(rows, tokens_per_pack):
        logprob_n, _ = policy.logprobs(
            torch.from_numpy(pack.input_ids_BT).to(policy.device),
            torch.from_numpy(pack.rows_n).to(policy.device),
            targets[torch.from_numpy(pack.terms_n)].to(policy.device),
            temperature=1.0,
        )
        loss = -logprob_n.sum() / total
        loss.backward()
        loss_sum += float(loss.detach())
    return loss_sum
