#!/usr/bin/env python
"""Position of pivots relative to the first error of the rollout, which the synthetic tasks know.

    python -m benchmarks.pivot_errors runs/methods --json docs/results/lab/pivot_errors.json

Reads the trees that an experiment has saved while training. A pivot is *before* the error if no wrong segment stands in its
prefix; behind one, only a correction or luck saves the rollout (two errors that cancel, a multiplication by 0). The distance is
that of the pivot from the first error of its rollout, in tokens. Also: what Q would do for other gammas, on the same rollouts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepgrpo.config import Config, DeepExplore, GeneratedData, load_recipe
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
    parser.add_argument("experiment", type=Path, help="directory of an experiment with saved trees")
    parser.add_argument("--arms", nargs="+", help="default: all with pivots")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for folder in sorted((options.experiment / "arms").iterdir()):
        arm, recipe = folder.name, load_recipe(RunDir(next(folder.glob("seed-*"))).config)
        if recipe.explore.type == "root" or arm not in (options.arms or [arm]):
            continue
        assert isinstance(recipe.data, GeneratedData), "only the synthetic tasks know first errors"
        trees = saved_trees(folder)
        found[arm] = pivots_of(trees, build_synthetic(recipe.data))
        print(arm, json.dumps(found[arm]), flush=True)
        if arm == "deep":
            found["q_before_error"] = mass_before_error(trees, recipe)
            print(found["q_before_error"])
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")


def saved_trees(arm: Path) -> list[Tree]:
    """The saved trees of all runs of an arm."""
    runs = map(RunDir, sorted(arm.glob("seed-*")))
    return [tree for run in runs for file in run.tree_files().values() for tree in load_trees(file)]


def pivots_of(trees: Sequence[Tree], task: SyntheticTask) -> dict[str, float | None]:
    """Shares over the pivots of failed rollouts with a known error; characters are tokens in these tasks."""
    before, distance, rescued, mixed, tokens = [], [], [], [], []
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
            distance.append(abs(at - error))
            rescued.append(succeeds(tree, number))
            mixed.append(is_mixed(rewards))
            tokens.append(sum(len(tree.nodes[child].tokens) for child in tree.children(number)))
    here, saved, signal, cost = (np.array(each, dtype=float) for each in (before, rescued, mixed, tokens))
    return {
        "pivots": float(len(here)), "before_error": mean(here), "distance": mean(np.array(distance, dtype=float)),
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
