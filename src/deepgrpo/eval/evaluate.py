"""Accuracy of a policy on held-out questions: greedy, and with samples pass@k and maj@k.

    prompts ─► one greedy completion each ─┐
          └──► `samples` draws each ───────┴─► judge ─► EvalResult(metrics, rows, stats)

The draws of a prompt depend on (seed, prompt id, index) and not on the training step. All evaluations of a run share
their random numbers (common random numbers), which reduces the sampling noise of differences along a curve. Another
seed gives an independent evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepgrpo import rng
from deepgrpo.config import SamplingConfig
from deepgrpo.engines.base import Engine, SampleStats, SamplingParams
from deepgrpo.errors import ConfigError, DataError
from deepgrpo.eval.judging import Judge, Judged
from deepgrpo.eval.pass_at_k import maj_at_k, pass_at_k
from deepgrpo.explore.episodes import Episodes
from deepgrpo.feedback import Score
from deepgrpo.records import Prompt, SampleRequest
from deepgrpo.rewards.base import Reward
from deepgrpo.stats import standard_error


@dataclass(frozen=True, slots=True)
class EvalRow:
    """Result of one prompt: a line of the rows file.

    Example: EvalRow(id="gsm8k-7", answer="72", greedy_text="... #### 72", greedy_reward=1.0,
    sampled_rewards=(1.0, 0.0), sampled_answers=("72", "70")).
    """

    id: str
    answer: str | None
    greedy_text: str
    greedy_reward: float
    """The figure that is measured: the reward, or that of the part `reward.success`."""
    greedy_length: int
    greedy_finish: str
    sampled_rewards: tuple[float, ...] = ()
    sampled_answers: tuple[str | None, ...] = ()
    """Votes; None for a sample without a vote."""
    greedy_parts: Mapping[str, float] = field(default_factory=dict)
    """Parts of the reward by name, before their weights; empty for a reward without parts."""

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Figures of one evaluation.

    Example: EvalResult(metrics={"eval/greedy": 0.58, "eval/pass@4": 0.71, ...}, rows=(...), stats=...).
    """

    metrics: Mapping[str, float]
    """`eval/` + greedy, greedy_se, length, truncated, unparsed, problems, prompts; with samples also sampled,
    sampled_se, sampled_length, sampled_truncated, sampled_unparsed, pass@k and maj@k. `_se` is a standard error over
    prompts, length is in tokens with the stop token, problems is a count of failed checks. A truncated completion that
    the reward did not see is not unparsed. Of a reward with parts, `greedy` and `sampled` measure the part
    `reward.success`, and `reward/NAME` is the mean of each part among the greedy completions, before its weight.
    With an environment also `turns`, their mean number. Of a mix also `eval/source/NAME/` + prompts, greedy, greedy_se and
    sampled."""
    rows: tuple[EvalRow, ...]
    stats: SampleStats
    """Cost of both rounds of sampling."""


def evaluate(
    engine: Engine,
    reward: Reward,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    *,
    sampling: SamplingConfig,
    samples: int = 0,
    k: Sequence[int] = (),
    truncated_value: float | None = 0.0,
    seed: int = 0,
    success_threshold: float = 0.0,
    chunk: int | None = None,
    progress: Callable[[int], None] | None = None,
    episodes: Episodes | None = None,
) -> EvalResult:
    """Score one greedy completion and `samples` sampled ones per prompt.

    Args:
        engine: samples from the policy to measure.
        reward: scores the completions.
        prompts: at least one, tokenized.
        tokenizer: anything with `decode(tokens, skip_special_tokens=True)`.
        sampling: distribution and stop strings of the sampled completions. `max_new_tokens` bounds the greedy one
            too, and is reduced so that prompt and response fit into `max_total_tokens`.
        samples: sampled completions per prompt; 0: greedy only.
        k: report pass@k and maj@k for these; each in 1..samples.
        truncated_value: reward of a truncated completion; None: score it like any other.
        seed: random seed; the keys are those of (seed, prompt id, index of the sample).
        success_threshold: rewards above it count as correct in pass@k and maj@k. The other figures are mean rewards.
        chunk: completions per call of the engine (at least those of one prompt); None: all at once. It sets how often
            `progress` is called and changes no figure.
        progress: called with the number of completions just finished.
        episodes: plays episodes with an environment, whose last turn is scored; None: a response is one turn.

    In maj@k a completion votes with the answer that the reward reads (`Voting`, or else `loose_answer`). A completion
    has no vote if the reward found no answer in it, or if it was truncated and `truncated_value` is set. The majority
    is correct if the first completion with the winning answer is correct; without any vote it is wrong.

    Raises:
        ConfigError: a k is not in 1..samples.
        DataError: there are no prompts, or a prompt leaves no room for a response.
    """
    bad = [each for each in k if not 1 <= each <= samples]
    if bad:
        raise ConfigError(
            f"pass@{bad[0]} needs at least {max(bad[0], 1)} samples per prompt, but samples is {samples}; "
            "raise it or drop that k"
        )
    if not prompts:
        raise DataError("there are no prompts to evaluate on; check the data set's path, limit and max_prompt_tokens")
    judged = Judge(engine, reward, tokenizer, truncated_value, chunk, progress, episodes)

    greedy_requests = [
        SampleRequest(p.tokens, (rng.key(seed, "eval", p.id, "greedy"),), _room(p, sampling)) for p in prompts
    ]
    greedy = judged(prompts, greedy_requests, SamplingParams(greedy=True, stop=sampling.stop))
    scored = [only for (only,) in greedy.groups]
    metrics = _describe(scored, prefix="eval/")
    metrics["eval/greedy"] = _mean([each.score.judged for each in scored])
    metrics["eval/greedy_se"] = standard_error([each.score.judged for each in scored])
    metrics |= _part_means([each.score for each in scored])
    metrics["eval/prompts"] = float(len(prompts))
    if episodes is not None:
        metrics["eval/turns"] = _mean([len(each.completion.replies) for each in scored])
    stats = greedy.stats

    drawn: list[list[Judged]] = [[] for _ in prompts]
    if samples:
        keys = [tuple(rng.key(seed, "eval", p.id, i) for i in range(samples)) for p in prompts]
        requests = [SampleRequest(p.tokens, ks, _room(p, sampling)) for p, ks in zip(prompts, keys, strict=True)]
        params = SamplingParams.of(sampling)
        sampled = judged(prompts, requests, params)
        drawn, stats = sampled.groups, stats + sampled.stats
        flat = [each for group in drawn for each in group]
        scored += flat
        metrics |= _describe(flat, prefix="eval/sampled_")
        means = [_mean([each.score.judged for each in group]) for group in drawn]
        metrics["eval/sampled"] = _mean(means)
        metrics["eval/sampled_se"] = standard_error(means)
        for each_k in k:
            correct = [sum(each.score.judged > success_threshold for each in group) for group in drawn]
            metrics[f"eval/pass@{each_k}"] = _mean([pass_at_k(samples, c, each_k) for c in correct])
            winners = [maj_at_k([each.vote for each in group], each_k) for group in drawn]
            metrics[f"eval/maj@{each_k}"] = _mean(
                [
                    winner is not None and group[winner].score.judged > success_threshold
                    for winner, group in zip(winners, drawn, strict=True)
                ]
            )
    metrics["eval/problems"] = float(sum(each.score.problem is not None for each in scored))

    rows = tuple(
        EvalRow(
            id=prompt.id,
            answer=prompt.answer,
            greedy_text=first.text,
            greedy_reward=first.score.judged,
            greedy_length=len(first.completion.tokens),
            greedy_finish=first.completion.finish,
            greedy_parts={name: part.value for name, part in first.score.parts.items()},
            sampled_rewards=tuple(each.score.judged for each in group),
            sampled_answers=tuple(each.vote for each in group),
        )
        for prompt, (first,), group in zip(prompts, greedy.groups, drawn, strict=True)
    )
    metrics |= _by_source(prompts, rows)
    return EvalResult(dict(sorted(metrics.items())), rows, stats)


def _room(prompt: Prompt, sampling: SamplingConfig) -> int:
    """Longest response in tokens: max_new_tokens, within max_total_tokens."""
    if sampling.max_total_tokens is None:
        return sampling.max_new_tokens
    room = min(sampling.max_new_tokens, sampling.max_total_tokens - len(prompt.tokens))
    if room < 1:
        raise DataError(
            f"prompt {prompt.id!r} has {len(prompt.tokens)} tokens, which leaves no room for a response within "
            f"{sampling.max_total_tokens} tokens; set max_prompt_tokens lower or max_total_tokens higher"
        )
    return room


def _describe(judged: Sequence[Judged], prefix: str) -> dict[str, float]:
    return {
        f"{prefix}length": _mean([len(each.completion.tokens) for each in judged]),
        f"{prefix}truncated": _mean([each.completion.finish == "length" for each in judged]),
        f"{prefix}unparsed": _mean([not each.score.parsed for each in judged]),
    }


def _part_means(scores: Sequence[Score]) -> dict[str, float]:
    return {f"eval/reward/{name}": _mean([score.parts[name].value for score in scores]) for name in scores[0].parts}


def _by_source(prompts: Sequence[Prompt], rows: Sequence[EvalRow]) -> dict[str, float]:
    """The figures of each source of a mix; empty without a mix."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(prompt.source for prompt in prompts if prompt.source):
        of = [row for prompt, row in zip(prompts, rows, strict=True) if prompt.source == name]
        found[f"eval/source/{name}/prompts"] = float(len(of))
        found[f"eval/source/{name}/greedy"] = _mean([row.greedy_reward for row in of])
        found[f"eval/source/{name}/greedy_se"] = standard_error([row.greedy_reward for row in of])
        if of[0].sampled_rewards:
            found[f"eval/source/{name}/sampled"] = _mean([_mean(row.sampled_rewards) for row in of])
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
