#!/usr/bin/env python
"""Position of pivots relative to the first error of the rollout, which the synthetic tasks know.

    python -m benchmarks.pivot_errors runs/strict --json FILE                                  trees saved while training
    python -m benchmarks.pivot_errors strict --starts runs/regimes/strict-101 --json FILE      before training, by sampling
    python -m benchmarks.pivot_errors --starts runs/demo --json FILE                    each strategy of ARMS, on a run's recipe

The last two forms sample trees from the start weights of runs, for the arms of an experiment or for one pivot per failed
rollout with each strategy of ARMS; rollouts have the same draws in all arms. A pivot is *before* the error if no wrong
segment stands in its prefix; behind one, only a correction or luck saves the rollout (two errors that cancel, a
multiplication by 0). It is *exact* if it is the start of the wrong segment. The distance is that of the pivot from the first
error of its rollout, in tokens; `steps` is the same in steps and signed, negative behind the error. What finding a pivot
costs is counted too: tokens forwarded, and tokens sampled for answers. Also: what Q would do for other gammas, on the same
rollouts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.regimes import opened
from deepgrpo.config import Config, DeepExplore, GeneratedData, PivotExplore, load_recipe, parse_config
from deepgrpo.explore.deep import log_q
from deepgrpo.explore.grow import grow
from deepgrpo.explore.pivots import candidates
from deepgrpo.explore.recoverability import Recoverability
from deepgrpo.explore.segments import build_segmenter
from deepgrpo.lab.compare.experiment import find_experiment, load_experiment
from deepgrpo.lab.compare.plan import expand
from deepgrpo.prompts import synthetic
from deepgrpo.prompts.source import Cursor
from deepgrpo.prompts.synthetic import SyntheticTask, build_synthetic
from deepgrpo.records import Tree
from deepgrpo.runs.facts import is_mixed, succeeds
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.trees import load_trees
from deepgrpo.stats import clustered_proportion

GAMMAS = (-20.0, 0.0, 1.0, 2.0, 3.0)
ARMS: Mapping[str, Mapping[str, Any]] = {
    "belief": {"cue": "#"}, "deep": {}, "random": {}, "oracle": {},
    "located": {"question": "{question}{steps}#", "step": "{text}", "answer_tokens": 2},
}  # fmt: skip
"""Strategies, with their keys beside those that all share. `located` asks in the characters of the task: a model from scratch
has no words, so this tests the machinery and not the idea."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", nargs="?", help="directory of a finished experiment; with --starts its name or file")
    parser.add_argument("--starts", nargs="+", type=Path, help="run directories with the weights to sample from")
    parser.add_argument("--arms", nargs="+", help="default: all with pivots")
    parser.add_argument("--prompts", type=int, default=64, help="with --starts: prompts of each arm and start")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.starts and not options.experiment:
        arms = {arm: recipe_of(options.starts[0], arm) for arm in ARMS}
    elif options.starts:
        path = find_experiment(options.experiment)
        plan = expand(load_experiment(path), path)
        arms = {arm: plan.of(arm)[0].config for arm in plan.experiment.arms}
    else:
        folder = Path(options.experiment) / "arms"
        arms = {each.name: load_recipe(RunDir(next(each.glob("seed-*"))).config) for each in sorted(folder.iterdir())}
    found: dict[str, Any] = {}
    for arm, recipe in arms.items():
        if recipe.explore.type == "root" or arm not in (options.arms or arms):
            continue
        assert isinstance(recipe.data, GeneratedData), "only the synthetic tasks know first errors"
        if options.starts:
            trees, cost = sampled_trees(recipe, options.starts, options.prompts)
        else:
            trees, cost = saved_trees(options.experiment, arm), {}
        found[arm] = pivots_of(trees, build_synthetic(recipe.data)) | cost
        print(arm, json.dumps(found[arm]), flush=True)
        if arm == "deep":
            found["q_before_error"] = mass_before_error(trees, recipe)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")


def recipe_of(directory: Path, arm: str) -> Config:
    """The recipe of a run, with the strategy of an arm of ARMS and one pivot in each failed rollout."""
    recipe = load_recipe(RunDir(directory).config)
    shared: dict[str, Any] = {"num_rollouts": recipe.explore.num_rollouts, "branches_per_pivot": 8}
    if arm != "oracle" and isinstance(recipe.explore, PivotExplore):
        shared["segments"] = recipe.explore.segments.model_dump()
    return parse_config({**recipe.model_dump(by_alias=True), "explore": {"type": arm, **shared, **ARMS[arm]}})


def saved_trees(experiment: str, arm: str) -> list[Tree]:
    """The saved trees of all runs of an arm."""
    runs = map(RunDir, sorted(Path(experiment).glob(f"arms/{arm}/seed-*")))
    return [tree for run in runs for file in run.tree_files().values() for tree in load_trees(file)]


def sampled_trees(config: Config, starts: Sequence[Path], prompts: int) -> tuple[list[Tree], dict[str, float]]:
    """Trees of a step from each start, and their cost; a step before it, on other prompts, has fitted the strategy's state."""
    trees: list[Tree] = []
    sampled = signals = asked = 0
    for start in starts:
        run = opened(config, RunDir(start))
        state = run.strategy.initial_state()
        for step in range(2):
            chosen, _ = run.source.take(Cursor(position=step * prompts), prompts)
            growth = grow(
                chosen, run.strategy, state, run.engine, run.judge, decode=run.decode, params=run.sampling_params,
                limits=run.limits, seed=77, step=step, signals=run.signals, episodes=run.episodes,
            )  # fmt: skip
            state = run.strategy.observe(state, growth.trees)
        trees += growth.trees
        sampled, signals = sampled + growth.sampled_tokens, signals + growth.signal_tokens
        asked += growth.signal_stats.sampled_tokens
    pivots = max(1, sum(len(tree.pivots) - 1 for tree in trees))
    return trees, {
        "tokens_per_prompt": sampled / len(trees), "signal_tokens_per_prompt": signals / len(trees),
        "signal_tokens_per_pivot": signals / pivots, "answer_tokens_per_pivot": asked / pivots,
    }  # fmt: skip


def pivots_of(trees: Sequence[Tree], task: SyntheticTask) -> dict[str, float | None]:
    """Shares over the pivots of failed rollouts with a known error; characters are tokens in these tasks."""
    before, distance, steps, rescued, mixed, tokens = [], [], [], [], [], []
    by_prompt: dict[str, list[bool]] = {}
    for tree in trees:
        for number, pivot in enumerate(tree.pivots):
            if pivot.stream != "branch" or pivot.parent < 0 or tree.nodes[pivot.parent].reward > 0:
                continue
            text = tree.nodes[pivot.parent].text
            error = task.first_error(tree.prompt, text)
            if error is None:
                continue
            at = len(tree.response(pivot.parent, pivot.offset))
            rewards = [tree.nodes[child].reward for child in tree.children(number)]
            before.append(task.first_error(tree.prompt, text[:at]) is None)
            by_prompt.setdefault(tree.prompt.id, []).append(before[-1])
            distance.append(abs(at - error))
            steps.append(text[:error].count(";") - text[:at].count(";"))
            rescued.append(succeeds(tree, number))
            mixed.append(is_mixed(rewards))
            tokens.append(sum(len(tree.nodes[child].tokens) for child in tree.children(number)))
    here, saved, signal, cost = (np.array(each, dtype=float) for each in (before, rescued, mixed, tokens))
    away = np.array(distance, dtype=float)
    groups = list(by_prompt.values())
    share = clustered_proportion([sum(each) for each in groups], [len(each) for each in groups]) if groups else None
    return {
        "pivots": float(len(here)), "before_error": mean(here),
        "before_low": share.low if share else None, "before_high": share.high if share else None,
        "exact": mean(away == 0), "distance": mean(away), "steps": mean(np.array(steps, dtype=float)),
        "rescued_before": mean(saved[here == 1]), "rescued_behind": mean(saved[here == 0]), "mixed": mean(signal),
        "mixed_per_1k": float(1000 * signal.sum() / cost.sum()) if len(cost) else None,
    }  # fmt: skip


def mean(values: np.ndarray) -> float | None:
    """None of nothing."""
    return float(values.mean()) if len(values) else None


def mass_before_error(trees: Sequence[Tree], recipe: Config) -> dict[str, float]:
    """Share of Q on states before the first error, by gamma; with the fit of the paper's figure and with P = 1."""
    assert isinstance(recipe.data, GeneratedData) and isinstance(recipe.explore, DeepExplore)
    task = build_synthetic(recipe.data)
    segment = build_segmenter(recipe.explore.segments, synthetic.tokenizer(synthetic.alphabet(recipe.data)))
    fits = {"w -3.2, b 1.4": Recoverability(w=-3.175, b=1.427, fitted=True), "P = 1": Recoverability()}
    shares: dict[str, list[float]] = {}
    for tree in trees:
        for _, node in tree.stream("main"):
            offsets, ratios = candidates(segment(node.tokens), room=10_000)
            if node.reward > 0 or not offsets or task.first_error(tree.prompt, node.text) is None:
                continue
            early = np.array([task.first_error(tree.prompt, node.text[:offset]) is None for offset in offsets])
            for name, fit in fits.items():
                for gamma in GAMMAS:
                    q = np.exp(log_q(ratios, fit, gamma))
                    shares.setdefault(f"gamma {gamma:g}, {name}", []).append(float(q[early].sum()))
    return {name: float(np.mean(each)) for name, each in shares.items()}


if __name__ == "__main__":
    main()
