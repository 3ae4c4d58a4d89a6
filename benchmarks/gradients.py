#!/usr/bin/env python
"""Quality of the gradient of one step, and its cost in sampled tokens, for each method.

    python -m benchmarks.gradients runs/methods/warmstart/seed-1 --json docs/results/lab/gradients.json

From one policy, the gradient of a step of each method is compared with the gradient of GRPO on thousands of prompts:

    cos      cosine with that reference, corrected for the noise of the reference itself
    snr²     cos² / (1 - cos²). For an unbiased gradient it grows in proportion to what is sampled, so
    snr²/1k  per thousand sampled tokens is how dear the direction was

For methods with branches the same is said of the gradient of each stream, with the ratio of their norms and the cosine between
them. The optimizer never moves: its learning rate is 0.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepgrpo.config import Config
from deepgrpo.explore.grow import grow
from deepgrpo.lab.compare.experiment import find_experiment, load_experiment
from deepgrpo.lab.compare.plan import expand
from deepgrpo.lab.machine import machine_and_versions
from deepgrpo.prompts.source import Cursor
from deepgrpo.runs.layout import RunDir
from deepgrpo.train.setup import Run, open_run

SKIPPED = ("grpo-lr2",)
"""Arms whose gradient is another arm's."""
CHUNK = 256
"""Prompts of the reference that are sampled at once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("starts", nargs="+", type=Path, help="run directories with the weights to start from")
    parser.add_argument("--experiment", default="methods", help="whose arms are measured")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6, help="of each arm, from the same weights")
    parser.add_argument("--reference", type=int, default=3072, help="prompts of the reference")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    arms = recipes(options.experiment)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    reliability = []
    for start in options.starts:
        halves = [torch.zeros(0), torch.zeros(0)]
        reference = opened(arms["grpo"], start)
        for i in range(options.reference // CHUNK):
            gradient, _ = step_gradient(reference, CHUNK, 1000 + i, first=10_000 + i * CHUNK)
            halves[i % 2] = gradient["all"] if i < 2 else halves[i % 2] + gradient["all"]
        agreement = cosine(*halves)
        # Spearman and Brown: what the sum of both halves is worth
        reliability.append(2 * agreement / (1 + agreement))
        truth = halves[0] + halves[1]
        for arm, config in arms.items():
            run = opened(config, start)
            for i in range(options.steps):
                gradient, tokens = step_gradient(run, options.prompts, i, first=i * options.prompts)
                found[arm].append(figures(gradient, truth, reliability[-1], tokens))
            print(start, arm, summary(found[arm][-options.steps :]), flush=True)
    result = {
        "arms": {arm: summary(each) for arm, each in found.items()}, "single": found, "reliability": reliability,
        "prompts": options.prompts, "steps": options.steps, "reference_prompts": options.reference,
        "starts": len(options.starts), **machine_and_versions(),
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    for arm, each in result["arms"].items():
        print(arm, {key: None if value is None else round(value, 3) for key, value in each.items()})


def recipes(experiment: str) -> dict[str, Config]:
    """The recipe of each arm, with an optimizer that does not move."""
    path = find_experiment(experiment)
    plan = expand(load_experiment(path), path)
    found = {}
    for arm in plan.experiment.arms:
        config = plan.of(arm)[0].config
        still = config.optim.model_copy(update={"lr": 0.0, "max_grad_norm": None, "weight_decay": 0.0})
        if arm not in SKIPPED:
            found[arm] = config.model_copy(update={"optim": still})
    return found


def opened(config: Config, start: Path) -> Run:
    """The parts of a run with the start weights; nothing is written, but where it would be must be free."""
    with tempfile.TemporaryDirectory() as place:
        elsewhere = config.run.model_copy(update={"dir": place})
        run = open_run(config.model_copy(update={"run": elsewhere}), None)
    run.policy.load_weights(RunDir(start).start)
    return run


def step_gradient(run: Run, prompts: int, number: int, first: int) -> tuple[dict[str, Tensor], int]:
    """The gradient of one step, and of each of its streams, flat; and the tokens that it sampled."""
    chosen, _ = run.source.take(Cursor(position=first), prompts)
    growth = grow(
        chosen, run.strategy, run.strategy.initial_state(), run.engine, run.judge, decode=run.decode,
        params=run.sampling_params, limits=run.limits, seed=77, step=number, signals=run.signals,
    )  # fmt: skip
    credits = [run.strategy.credit(tree) for tree in growth.trees]
    streams = {span.stream for credit in credits for span in credit.spans}
    gradients = {"all": updated(run, growth.trees, credits, run.config)}
    if streams == {"main", "branch"}:
        without = run.config.loss.model_copy(update={"lambda_": 0.0})
        gradients["main"] = updated(run, growth.trees, credits, run.config.model_copy(update={"loss": without}))
        gradients["branch"] = gradients["all"] - gradients["main"]
    return gradients, growth.stats.sampled_tokens


def updated(run: Run, trees: Sequence[Any], credits: Sequence[Any], config: Config) -> Tensor:
    run.learner.config = config  # type: ignore[attr-defined]  # one process: it is a Learner
    run.learner.update(trees, credits)
    gradients = [p.grad for p in run.policy.trainable().values()]
    return torch.cat([g.flatten() for g in gradients if g is not None]).double()


def figures(gradient: Mapping[str, Tensor], truth: Tensor, reliability: float, tokens: int) -> dict[str, float]:
    """Figures of one step."""
    found: dict[str, float] = {"tokens": float(tokens)}
    for stream, each in gradient.items():
        found[f"cos_{stream}"] = cosine(each, truth) / math.sqrt(reliability)
    if "branch" in gradient:
        found["norm_ratio"] = float(gradient["branch"].norm() / gradient["main"].norm())
        found["cos_streams"] = cosine(gradient["main"], gradient["branch"])
    return found


def summary(steps: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Means over the steps; the signal-to-noise ratio is taken of the mean cosine."""
    means: dict[str, float | None] = {key: statistics.fmean(step[key] for step in steps) for key in steps[0]}
    tokens, cos = means["tokens"], means["cos_all"]
    assert tokens is not None and cos is not None
    return means | {"snr2_per_1k": 1000 * cos**2 / max(1e-9, 1 - cos**2) / tokens}


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a @ b) / (a.norm() * b.norm()))


if __name__ == "__main__":
    main()
