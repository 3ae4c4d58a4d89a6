#!/usr/bin/env python
"""Position of pivots relative to the first error of the rollout, which the synthetic tasks know.

    python -m benchmarks.pivot_errors runs/methods --arms deep random oracle --json docs/results/lab/pivot_errors.json

Reads the saved trees of an experiment. A pivot before the first error has a right prefix; behind it, only luck saves the
rollout (two errors that cancel, a multiplication by 0: `chance`). Also: what Q would do for other gammas, on the same rollouts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepgrpo.config import GeneratedData, load_recipe
from deepgrpo.explore.deep import log_q
from deepgrpo.explore.pivots import candidates
from deepgrpo.explore.recoverability import Recoverability
from deepgrpo.explore.segments import build_segmenter
from deepgrpo.prompts import synthetic
from deepgrpo.prompts.synthetic import SyntheticTask, build_synthetic
from deepgrpo.records import Tree
from deepgrpo.runs.facts import is_mixed, succeeds
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.trees import load_trees

GAMMAS = (-20.0, 0.0, 1.0, 2.0, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--arms", nargs="+", default=["deep", "random"])
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    recipe = load_recipe(RunDir(next((options.experiment / "arms" / "deep").glob("seed-*"))).config)
    assert isinstance(recipe.data, GeneratedData), "only the synthetic tasks know first errors"
    task = build_synthetic(recipe.data)
    # Q is asked about the rollouts of `deep`, whether or not its pivots are
    saved = {arm: trees_of(options.experiment, arm) for arm in dict.fromkeys([*options.arms, "deep"])}
    for arm in options.arms:
        if trees := [tree for each in saved[arm].values() for tree in each]:
            found[arm] = {"runs": len(saved[arm]), **pivots_of(trees, task)}
        print(arm, json.dumps(found.get(arm)))
    found["q_before_error"] = mass_before_error([tree for each in saved["deep"].values() for tree in each], recipe)
    print(found["q_before_error"])
    options.json.write_text(json.dumps(found, indent=1) + "\n")


def trees_of(experiment: Path, arm: str) -> dict[str, list[Tree]]:
    """The saved trees of an arm by run, of the runs that have some."""
    found: dict[str, list[Tree]] = {}
    for run in map(RunDir, sorted(experiment.glob(f"arms/{arm}/seed-*"))):
        if trees := [tree for file in run.tree_files().values() for tree in load_trees(file)]:
            found[run.path.name] = trees
    return found


def error_of(tree: Tree, node: int, task: SyntheticTask) -> int | None:
    """Characters, which are tokens here, before the first wrong segment of a rollout."""
    return task.first_error(tree.prompt, tree.nodes[node].text)


def pivots_of(trees: Sequence[Tree], task: SyntheticTask) -> dict[str, float]:
    """Shares over the pivots of failed rollouts with a known error."""
    before, rescued, mixed, tokens = [], [], [], []
    for tree in trees:
        for number, pivot in enumerate(tree.pivots):
            error = error_of(tree, pivot.parent, task) if pivot.stream == "branch" and pivot.parent >= 0 else None
            if error is None:
                continue
            rewards = [tree.nodes[child].reward for child in tree.children(number)]
            before.append(pivot.offset <= error)
            rescued.append(succeeds(tree, number))
            mixed.append(is_mixed(rewards))
            tokens.append(sum(len(tree.nodes[child].tokens) for child in tree.children(number)))
    here, saved, signal, cost = (np.array(each, dtype=float) for each in (before, rescued, mixed, tokens))
    return {
        "pivots": float(len(here)), "before_error": float(here.mean()),
        "rescued_before": float(saved[here == 1].mean()),
        "rescued_behind": float(saved[here == 0].mean()) if (here == 0).any() else 0.0,
        "mixed": float(signal.mean()), "mixed_per_1k": float(1000 * signal.sum() / cost.sum()),
    }  # fmt: skip


def mass_before_error(trees: Sequence[Tree], recipe: Any) -> dict[str, float]:
    """Share of Q on states before the first error, by gamma; with the fit of the paper's figure and with P = 1."""
    task = build_synthetic(recipe.data)
    segment = build_segmenter(recipe.explore.segments, synthetic.tokenizer(synthetic.alphabet(recipe.data)))
    fits = {"w -3.2, b 1.4": Recoverability(w=-3.175, b=1.427, fitted=True), "P = 1": Recoverability()}
    shares: dict[str, list[float]] = {}
    for tree in trees:
        for index, node in tree.stream("main"):
            error = error_of(tree, index, task) if node.reward <= 0 else None
            offsets, ratios = candidates(segment(node.tokens), room=10_000)
            if error is None or not offsets:
                continue
            early = np.array(offsets) <= error
            for name, fit in fits.items():
                for gamma in GAMMAS:
                    q = np.exp(log_q(ratios, fit, gamma))
                    shares.setdefault(f"gamma {gamma:g}, {name}", []).append(float(q[early].sum()))
    return {name: float(np.mean(each)) for name, each in shares.items()}


if __name__ == "__main__":
    main()
