#!/usr/bin/env python
"""Where pivots lie, relative to the first error of the rollout, and what finding them costs: strategies on the same rollouts.

    python -m benchmarks.first_error runs/demo --arms belief deep random oracle --json docs/results/lab/first_error.json

From the weights of one or several runs on a synthetic task, which knows the first wrong segment of every response. All arms
expand the same failed rollouts, with one pivot each. Per arm:

    before      share of the pivots at or before the start of the first wrong step
    exact       share of them right before it
    steps       mean distance in steps; positive: earlier than needed, negative: behind the error
    forwarded   tokens forwarded to choose a pivot, for each; `asked`: tokens sampled for it
    mixed/1k    groups with both outcomes per thousand sampled tokens, branches and answers together

`pivot_errors.py` asks the same of the saved trees of a finished experiment.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gradients import opened
from deepgrpo.config import GeneratedData, PivotExplore, load_recipe, parse_config
from deepgrpo.explore.grow import Growth, grow
from deepgrpo.lab.machine import machine_and_versions
from deepgrpo.prompts.source import Cursor
from deepgrpo.prompts.synthetic import SyntheticTask, build_synthetic
from deepgrpo.records import Pivot, Tree
from deepgrpo.runs.facts import is_mixed, succeeds
from deepgrpo.runs.layout import RunDir
from deepgrpo.stats import clustered_proportion
from deepgrpo.train.setup import Run

ARMS: Mapping[str, Mapping[str, Any]] = {
    "belief": {"cue": "#"}, "deep": {}, "random": {}, "oracle": {},
    "located": {"question": "{question}{steps}#", "step": "{text}", "answer_tokens": 2},
}  # fmt: skip
"""Keys of each arm beside those that all share. `located` asks in the characters of the task: a test of the machinery."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories with a start model, on a synthetic task")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--prompts", type=int, default=64, help="prompts of a step")
    parser.add_argument("--steps", type=int, default=4, help="steps, between which `deep` fits its recoverability")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for arm in options.arms:
        places: list[dict[str, Any]] = []
        cost = np.zeros(3)
        for directory in options.runs:
            run = opened(recipe_of(directory, arm), directory)
            each, spent = measure(run, options.prompts, options.steps)
            places += each
            cost += spent
        found[arm] = figures(places, *cost)
        print(f"{arm:10s}", json.dumps(found[arm]), flush=True)
    if options.json:
        setting = {"prompts": options.prompts, "steps": options.steps, "runs": len(options.runs), **machine_and_versions()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"arms": found, **setting}, indent=1) + "\n")


def recipe_of(directory: Path, arm: str) -> Any:
    """The recipe of a run, with an arm's strategy and one pivot in each failed rollout."""
    recipe = load_recipe(RunDir(directory).config)
    assert isinstance(recipe.data, GeneratedData), "only the synthetic tasks know first errors"
    shared: dict[str, Any] = {"num_rollouts": recipe.explore.num_rollouts, "branches_per_pivot": 8}
    if arm != "oracle" and isinstance(recipe.explore, PivotExplore):
        shared["segments"] = recipe.explore.segments.model_dump()
    return parse_config({**recipe.model_dump(by_alias=True), "explore": {"type": arm, **shared, **ARMS[arm]}})


def measure(run: Run, prompts: int, steps: int) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Pivots of some steps; and tokens forwarded to choose them, sampled to choose them, and sampled in branches."""
    assert isinstance(run.config.data, GeneratedData)
    task, state, cursor = build_synthetic(run.config.data), run.strategy.initial_state(), Cursor()
    found: list[dict[str, Any]] = []
    cost = np.zeros(3)
    for step in range(steps):
        chosen, cursor = run.source.take(cursor, prompts)
        growth: Growth = grow(
            chosen, run.strategy, state, run.engine, run.judge, decode=run.decode, params=run.sampling_params,
            limits=run.limits, seed=77, step=step, signals=run.signals,
        )  # fmt: skip
        state = run.strategy.observe(state, growth.trees)
        branches = sum(len(node.tokens) for tree in growth.trees for _, node in tree.stream("branch"))
        cost += (growth.signal_tokens, growth.signal_stats.sampled_tokens, branches)
        for tree in growth.trees:
            for number, pivot in enumerate(tree.pivots):
                if pivot.stream == "branch" and (place := place_of(tree, number, pivot, task)):
                    found.append(place)
    return found, cost


def place_of(tree: Tree, number: int, pivot: Pivot, task: SyntheticTask) -> dict[str, Any] | None:
    """Place and outcome of a pivot; None if its rollout has no error, as one that was cut off while right."""
    text = tree.nodes[pivot.parent].text
    error = task.first_error(tree.prompt, text)  # in characters, which are tokens here
    if error is None:
        return None
    steps = text[:error].count(";") - text[: pivot.offset].count(";")
    return {
        "prompt": tree.prompt.id,
        "before": float(pivot.offset <= error), "exact": float(steps == 0 and pivot.offset <= error), "steps": float(steps),
        "rescued": float(succeeds(tree, number)),
        "mixed": float(is_mixed([tree.nodes[child].reward for child in tree.children(number)])),
    }  # fmt: skip


def figures(places: Sequence[Mapping[str, Any]], forwarded: float, asked: float, branches: float) -> dict[str, Any]:
    """Means over the pivots, with a 95% interval of the share before the error, whose clusters are prompts."""
    count = len(places)
    means = {key: float(np.mean([place[key] for place in places])) for key in places[0] if key != "prompt"}
    clusters: dict[str, list[float]] = {}
    for place in places:
        clusters.setdefault(place["prompt"], []).append(place["before"])
    share = clustered_proportion([sum(each) for each in clusters.values()], [len(each) for each in clusters.values()])
    here = [place["rescued"] for place in places if place["before"]]
    behind = [place["rescued"] for place in places if not place["before"]]
    return {
        "pivots": count, **means, "before_low": share.low, "before_high": share.high,
        "rescued_before": float(np.mean(here)) if here else None, "rescued_behind": float(np.mean(behind)) if behind else None,
        "forwarded": forwarded / count, "asked": asked / count, "branch_tokens": branches / count,
        "mixed_per_1k": 1000 * means["mixed"] * count / (branches + asked),
    }  # fmt: skip


if __name__ == "__main__":
    main()
