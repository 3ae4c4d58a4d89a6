"""Figures of one policy before any reinforcement: what root rollouts reach, where they err, and from where they can be saved.

    prompts ─► a greedy and `samples` sampled responses each ─► accuracy, pass@k, luck, corrections, entropy, first errors
            ─► failed ones ─► K continuations from the prompt and from one state per band of depth ─► rescue, mixed groups

A state is *behind an error* if a wrong segment stands in its prefix (`first_error` of the synthetic tasks), else *before* it.
Counts are kept by prompt, so that policies can be pooled and intervals respect that samples of one prompt are alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepgrpo import rng
from deepgrpo.config import SegmentConfig
from deepgrpo.engines.base import SamplingParams
from deepgrpo.eval.pass_at_k import pass_at_k
from deepgrpo.explore.pivots import candidates
from deepgrpo.explore.segments import build_segmenter
from deepgrpo.prompts.chain import RETRACT
from deepgrpo.prompts.source import build_source
from deepgrpo.prompts.tasks import build_task
from deepgrpo.records import Completion, Prompt, SampleRequest
from deepgrpo.stats import clustered_proportion
from deepgrpo.train.setup import Run

KS = (1, 4, 16, 64)
GROUP = 8
"""Rollouts of a group at the prompt, as in a step of GRPO with N = 8."""
UNTOUCHED = 7_919
"""Added to the seed of `eval.data`, whose own questions have decided when the warm start ends."""


@dataclass(frozen=True, slots=True)
class Amounts:
    """Numbers of prompts, responses and states sampled from one policy."""

    prompts: int = 128
    samples: int = 64
    """Responses per prompt; a multiple of `GROUP`."""
    failed: int = 256
    """Most failed rollouts that are continued."""
    branches: int = 8
    """Continuations of a state."""
    bands: int = 8
    """Equal bands of the depth ratio; one state of each rollout is continued in every band."""


@dataclass(frozen=True, slots=True)
class Response:
    """A judged response. Example: Response(prompt=prompt, done=Completion(...), text="3+4=8;...#1", reward=0.0)."""

    prompt: Prompt
    done: Completion
    text: str
    reward: float


def measure(run: Run, amounts: Amounts, seed: int) -> dict[str, Any]:
    """Measure the policy of an opened run on held-out questions. Returns plain JSON, see `summary`."""
    data = run.config.eval.data
    assert data is not None, "a recipe of a regime has held-out questions"
    other = data.model_copy(update={"seed": getattr(data, "seed", 0) + UNTOUCHED})
    source = build_source(other, run.policy.tokenizer, seed=seed, context=run.limits.max_total_tokens)
    prompts = source.head(amounts.prompts)
    task = build_task(run.config.data)
    first_error = getattr(task, "first_error", None)
    greedy = _sample(run, [(p, ()) for p in prompts], 1, seed, "greedy", SamplingParams(greedy=True))
    sampled = _sample(run, [(p, ()) for p in prompts], amounts.samples, seed, "sampled", run.sampling_params)
    return {
        "greedy": statistics.fmean(each.reward for (each,) in greedy),
        "rollouts": _rollouts(sampled, task, run.config.explore.success_threshold),
        "states": _states(run, sampled, first_error, amounts, seed),
    }


def _sample(
    run: Run,
    starts: Sequence[tuple[Prompt, tuple[int, ...]]],
    count: int,
    seed: int,
    stage: str,
    params: SamplingParams,
) -> list[list[Response]]:
    """`count` judged responses of each start, a prompt with the first tokens of a response."""
    requests = []
    for number, (prompt, prefix) in enumerate(starts):
        room = min(run.limits.max_new_tokens, run.limits.max_total_tokens - len(prompt.tokens)) - len(prefix)
        keys = tuple(rng.key(seed, "regime", stage, prompt.id, number, i) for i in range(count))
        requests.append(SampleRequest(prompt.tokens + prefix, keys, room, len(prompt.tokens)))
    completions, _ = run.engine.sample(requests, params)
    flat = [
        (prompt, prefix, done) for (prompt, prefix), group in zip(starts, completions, strict=True) for done in group
    ]
    whole = [prefix + done.tokens for _, prefix, done in flat]
    texts = [run.decode(tokens) for tokens in whole]
    scores = run.judge([prompt for prompt, _, _ in flat], texts, whole, [done.finish for _, _, done in flat])
    judged = (
        Response(prompt, done, text, score.value)
        for (prompt, _, done), text, score in zip(flat, texts, scores, strict=True)
    )
    return chunks(list(judged), count)


def chunks(items: Sequence[Any], size: int) -> list[Any]:
    """Consecutive parts of this size."""
    return [items[i : i + size] for i in range(0, len(items), size)]


# ---------------------------------------------------------------- root rollouts


def _rollouts(sampled: Sequence[Sequence[Response]], task: Any, threshold: float) -> list[dict[str, Any]]:
    """Counts of each prompt's responses."""
    first_error = getattr(task, "first_error", None)
    found = []
    for group in sampled:
        good = [each.reward > threshold for each in group]
        errors = [first_error(each.prompt, each.text) if first_error else None for each in group]
        # the answer is right, whatever the reward wants besides
        answered = [
            first_error is not None and task.vote(each.prompt, each.text) == each.prompt.answer for each in group
        ]
        corrected = [RETRACT in each.text for each in group]
        found.append(
            {
                "samples": len(group), "successes": sum(good),
                "answered": sum(answered), "lucky": sum(a and e is not None for a, e in zip(answered, errors, strict=True)),
                "corrected": sum(corrected), "corrected_successes": sum(c and g for c, g in zip(corrected, good, strict=True)),
                "truncated": sum(each.done.finish == "length" for each in group),
                "tokens": sum(len(each.done.tokens) for each in group),
                "surprise": -sum(sum(each.done.logprobs) for each in group),
                "mixed": sum(0 < sum(part) < len(part) for part in chunks(good, GROUP)),
                # position of the first error within the failed responses that have one
                "errors": [
                    round(e / max(1, len(each.text)), 3)
                    for each, e, g in zip(group, errors, good, strict=True) if e is not None and not g
                ],
            }
        )  # fmt: skip
    return found


# ---------------------------------------------------------------- states of failed rollouts


def _states(
    run: Run, sampled: Sequence[Sequence[Response]], first_error: Callable[[Prompt, str], int | None] | None, amounts: Amounts,
    seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Continue failed rollouts from the prompt (band 0) and from one state per band."""
    failed = _failed(sampled, run.config.explore.success_threshold, amounts.failed)
    # a strategy without pivots has no segments: the steps of a chain, or sentences
    segments = getattr(run.config.explore, "segments", SegmentConfig(extra_ends=(";",)))
    segment = build_segmenter(segments, run.policy.tokenizer)
    starts: list[tuple[Prompt, tuple[int, ...]]] = []
    facts: list[dict[str, Any]] = []
    for number, each in enumerate(failed):
        offsets, ratios = candidates(segment(each.done.tokens), room=run.limits.max_new_tokens)
        for band, choice in _one_per_band(ratios, amounts.bands, rng.generator("regime states", seed, number)):
            prefix = each.done.tokens[: offsets[choice]]
            text = run.decode(prefix)
            error = first_error(each.prompt, text) if first_error else None
            starts.append((each.prompt, prefix))
            facts.append(
                {
                    "prompt": each.prompt.id, "band": band, "ratio": round(ratios[choice], 3),
                    "behind": None if first_error is None else error is not None, "marked": text.count(RETRACT),
                }
            )  # fmt: skip
    groups = _sample(run, starts, amounts.branches, seed, "states", run.sampling_params) if starts else []
    for fact, group in zip(facts, groups, strict=True):
        good = [each.reward > run.config.explore.success_threshold for each in group]
        fact |= {
            "successes": sum(good), "branches": len(good), "tokens": sum(len(each.done.tokens) for each in group),
            # successes that a correction behind this state has made possible
            "corrected": sum(g and each.text.count(RETRACT) > fact["marked"] for g, each in zip(good, group, strict=True)),
        }  # fmt: skip
    return facts


def _failed(sampled: Sequence[Sequence[Response]], threshold: float, most: int) -> list[Response]:
    """Failed rollouts, the first sample of every prompt before the second: harder prompts occur more often, as in training."""
    found = [each for turn in zip(*sampled, strict=True) for each in turn if each.reward <= threshold]
    return found[:most]


def _one_per_band(ratios: Sequence[float], bands: int, random: np.random.Generator) -> Iterator[tuple[int, int]]:
    """(band, index of a candidate) for the prompt, which is band 0, and every band that has candidates."""
    if ratios:
        yield 0, 0
    for band in range(1, bands + 1):
        inside = [i for i, r in enumerate(ratios) if i > 0 and band - 1 < round(r * bands, 9) <= band]
        if inside:
            yield band, int(random.choice(inside))


# ---------------------------------------------------------------- figures of several policies


def summary(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of all policies of a regime together, with the sampled accuracy of each."""
    prompts = [each for one in measured for each in one["rollouts"]]
    states = [each | {"cluster": f"{i} {each['prompt']}"} for i, one in enumerate(measured) for each in one["states"]]
    total = {key: sum(each[key] for each in prompts) for key in prompts[0] if key != "errors"}
    errors = np.array([e for each in prompts for e in each["errors"]])
    failures = total["samples"] - total["successes"]
    return {
        "policies": len(measured), "greedy": statistics.fmean(one["greedy"] for one in measured),
        "sampled": total["successes"] / total["samples"],
        "sampled_of_each": [
            sum(p["successes"] for p in one["rollouts"]) / sum(p["samples"] for p in one["rollouts"]) for one in measured
        ],
        "pass": {
            str(k): statistics.fmean(pass_at_k(p["samples"], p["successes"], k) for p in prompts)
            for k in KS if k <= prompts[0]["samples"]
        },
        "luck": ratio(total["lucky"], total["answered"]),
        "length": total["tokens"] / total["samples"], "entropy": total["surprise"] / total["tokens"],
        "truncated": total["truncated"] / total["samples"],
        "corrected": total["corrected"] / total["samples"],
        "success_if_corrected": ratio(total["corrected_successes"], total["corrected"]),
        "success_if_not": ratio(total["successes"] - total["corrected_successes"], total["samples"] - total["corrected"]),
        "mixed": total["mixed"] * GROUP / total["samples"], "mixed_per_1k": 1000 * total["mixed"] / total["tokens"],
        "failed_with_error": ratio(len(errors), failures),
        "error_position": [float(np.quantile(errors, q)) for q in (0.1, 0.5, 0.9)] if len(errors) else None,
        "bands": [
            {"band": band, **_band([each for each in states if each["band"] == band])}
            for band in sorted({each["band"] for each in states})
        ],
        "before": _side([each for each in states if each["behind"] is False and each["band"] > 0]),
        "behind": _side([each for each in states if each["behind"] and each["band"] > 0]),
    }  # fmt: skip


def _band(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mixed = sum(0 < each["successes"] < each["branches"] for each in states)
    return {
        "ratio": statistics.fmean(each["ratio"] for each in states), "states": len(states), **_rates(states),
        "mixed": mixed / len(states), "mixed_per_1k": 1000 * mixed / max(1, sum(each["tokens"] for each in states)),
        "before": _side([each for each in states if each["behind"] is False]),
        "behind": _side([each for each in states if each["behind"]]),
    }  # fmt: skip


def _side(states: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Figures of the states before an error, or of those behind one; None if there is no such state."""
    if not states:
        return None
    good = sum(each["successes"] for each in states)
    return {
        "states": len(states),
        **_rates(states),
        "by_correction": ratio(sum(each["corrected"] for each in states), good),
    }


def _rates(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rescue (a success among K continuations) and success of single continuations, with an interval clustered by prompt."""
    clusters: dict[str, list[bool]] = {}
    for each in states:
        clusters.setdefault(each["cluster"], []).append(each["successes"] > 0)
    share = clustered_proportion([sum(each) for each in clusters.values()], [len(each) for each in clusters.values()])
    return {
        "rescued": share.rate, "interval": [share.low, share.high],
        "succeed": sum(each["successes"] for each in states) / sum(each["branches"] for each in states),
    }  # fmt: skip


def ratio(part: float, whole: float) -> float | None:
    """A share, None of nothing."""
    return part / whole if whole and not math.isnan(whole) else None
