"""Figures of one policy before any reinforcement: what root rollouts reach, where they err, and from where they can be saved.

    prompts ─► a greedy and `samples` sampled responses each ─► accuracy, pass@k, luck, corrections, entropy, first errors
            ─► failed ones ─► K continuations from the prompt and from one state per band of depth ─► rescue, mixed groups
                              (of episodes: from the state before every turn)

A state is *behind an error* if a wrong segment stands in its prefix (`first_error` of the synthetic tasks), else *before* it.
Counts are kept by prompt, so that policies can be pooled and intervals respect that samples of one prompt are alike.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.regime_sampling import FirstError, Response, Start, corrections, from_prompts, sample, turn_of
from deepgrpo import rng
from deepgrpo.config import SegmentConfig
from deepgrpo.engines.base import SamplingParams
from deepgrpo.eval.pass_at_k import pass_at_k
from deepgrpo.explore.pivots import candidates
from deepgrpo.explore.segments import build_segmenter, node_ends
from deepgrpo.prompts.source import build_source
from deepgrpo.prompts.tasks import build_task
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


def measure(run: Run, amounts: Amounts, seed: int) -> dict[str, Any]:
    """Measure the policy of an opened run on held-out questions. Returns plain JSON, see `summary`."""
    data = run.config.eval.data
    assert data is not None, "a recipe of a regime has held-out questions"
    other = data.model_copy(update={"seed": getattr(data, "seed", 0) + UNTOUCHED})
    source = build_source(other, run.policy.tokenizer, seed=seed, context=run.limits.max_total_tokens)
    prompts = source.head(amounts.prompts)
    task = build_task(run.config.data)
    first_error = getattr(task, "first_error", None)
    greedy = sample(run, from_prompts(run, prompts, 1), seed, "greedy", SamplingParams(greedy=True))
    sampled = sample(run, from_prompts(run, prompts, amounts.samples), seed, "sampled", run.sampling_params)
    threshold = run.config.explore.success_threshold
    return {
        "greedy": statistics.fmean(each.reward > threshold for (each,) in greedy),
        "rollouts": _rollouts(run, sampled, task, threshold),
        "states": _states(run, sampled, first_error, amounts, seed),
    }


def chunks(items: Sequence[Any], size: int) -> list[Any]:
    """Consecutive parts of this size."""
    return [items[i : i + size] for i in range(0, len(items), size)]


# ---------------------------------------------------------------- root rollouts


def _rollouts(run: Run, sampled: Sequence[Sequence[Response]], task: Any, threshold: float) -> list[dict[str, Any]]:
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
        corrected = [corrections(run, first_error, each) > 0 for each in group]
        wrong = [(each, e) for each, e, g in zip(group, errors, good, strict=True) if e is not None and not g]
        counts = {
            "samples": len(group), "successes": sum(good),
            "answered": sum(answered), "lucky": sum(a and e is not None for a, e in zip(answered, errors, strict=True)),
            "corrected": sum(corrected), "corrected_successes": sum(c and g for c, g in zip(corrected, good, strict=True)),
            "truncated": sum(each.done.finish == "length" for each in group),
            "tokens": sum(each.sampled for each in group), "given": sum(each.given for each in group),
            "surprise": -sum(sum(each.done.logprobs) for each in group),
            "mixed": sum(0 < sum(part) < len(part) for part in chunks(good, GROUP)),
        }  # fmt: skip
        # position of the first error within the failed responses that have one
        errors_at = {"errors": [round(e / max(1, len(each.text)), 3) for each, e in wrong]}
        if run.episodes is not None:
            errors_at["error_turns"] = [turn_of(run, each, e) for each, e in wrong]
        found.append(counts | errors_at)
    return found


# ---------------------------------------------------------------- states of failed rollouts


def _states(
    run: Run, sampled: Sequence[Sequence[Response]], first_error: FirstError | None, amounts: Amounts, seed: int
) -> list[dict[str, Any]]:
    """Continue failed rollouts from the prompt (band 0) and one state per band; episodes from the state before each turn."""
    failed = _failed(sampled, run.config.explore.success_threshold, amounts.failed)
    # a strategy without pivots has no segments: turns, the steps of a chain, or sentences
    default = SegmentConfig(type="turn") if run.episodes else SegmentConfig(extra_ends=(";",))
    segments = getattr(run.config.explore, "segments", default)
    segment = build_segmenter(segments, run.policy.tokenizer)
    starts: list[Start] = []
    facts: list[dict[str, Any]] = []
    for number, each in enumerate(failed):
        offsets, ratios = candidates(node_ends(segment, each.node()), room=run.limits.response(each.tree))
        random = rng.generator("regime states", seed, number)
        places = enumerate(range(len(ratios))) if segments.type == "turn" else _one_per_band(ratios, amounts.bands, random)
        for band, choice in places:
            offset = offsets[choice]
            error = first_error(each.prompt, run.decode(each.tokens[:offset])) if first_error else None
            starts.append(each.state(offset, amounts.branches))
            facts.append(
                {
                    "prompt": each.prompt.id, "band": band, "ratio": round(ratios[choice], 3),
                    "behind": None if first_error is None else error is not None,
                    "marked": corrections(run, first_error, each, offset),
                }
            )  # fmt: skip
    groups = sample(run, starts, seed, "states", run.sampling_params) if starts else []
    for fact, group in zip(facts, groups, strict=True):
        good = [each.reward > run.config.explore.success_threshold for each in group]
        fact |= {
            "successes": sum(good), "branches": len(good), "tokens": sum(each.sampled for each in group),
            # successes that a correction behind this state has made possible
            "corrected": sum(
                g and corrections(run, first_error, each) > fact["marked"] for g, each in zip(good, group, strict=True)
            ),
        }  # fmt: skip
    return [fact for fact in facts if fact["branches"]]


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
    total = {key: sum(each[key] for each in prompts) for key in prompts[0] if not key.startswith("error")}
    errors = np.array([e for each in prompts for e in each["errors"]])
    failures = total["samples"] - total["successes"]
    turns = Counter(turn for each in prompts for turn in each.get("error_turns", ()))
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
        "given": total.get("given", 0) / total["samples"],
        # of episodes: the share of the failures with an error whose first one is in a turn, by its number
        "error_turns": {str(turn): turns[turn] / len(errors) for turn in sorted(turns)},
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
