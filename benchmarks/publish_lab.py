#!/usr/bin/env python
"""Publish a finished `deepgrpo compare` in docs/results: tables, pictures, and compact metrics of every step.

    python -m benchmarks.publish_lab runs/methods docs/results/lab

writes methods.md, methods.png, methods.json (every figure of every run), methods-figures.json (the tables in rows, which
`python -m benchmarks.map` reads), methods-dynamics.png (accuracy, entropy, length and
mixed groups over training) and methods-steps.json.gz (the columns below of every step of every run).
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepgrpo.lab.compare.layout import ExperimentDir, seed_name
from deepgrpo.lab.compare.plot import colour
from deepgrpo.lab.compare.plot import draw as draw_comparison
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.metrics import read_metrics

COLUMNS = (
    "step", "ledger/sampled_tokens", "ledger/optimizer_steps", "ledger/trained_tokens", "eval/greedy", "eval/sampled",
    "main/reward", "main/entropy", "main/length", "main/mixed", "branch/reward", "branch/mixed", "branch/groups", "grad_norm",
    "pivots/count", "pivots/ratio", "pivots/rescue_rate", "pivots/unrecoverable", "recoverability/w", "recoverability/b",
)  # fmt: skip
DRAWN = (
    ("eval/sampled", "sampled accuracy on watched questions, %", 100.0), ("main/entropy", "entropy, nats per token", 1.0),
    ("main/length", "tokens per response", 1.0), ("main/mixed", "mixed groups of rollouts, %", 100.0),
)  # fmt: skip
GRID = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path, help="directory of the experiment")
    parser.add_argument("target", type=Path, help="directory of the results")
    options = parser.parse_args()
    name, target = options.experiment.name, options.target
    target.mkdir(parents=True, exist_ok=True)
    paths = ExperimentDir(options.experiment)
    for source, ending in ((paths.comparison, ".json"), (paths.page, ".md"), (paths.figures, "-figures.json")):
        shutil.copyfile(source, target / f"{name}{ending}")
    result = json.loads((target / f"{name}.json").read_text())
    draw_comparison(result, target / f"{name}.png")
    result["experiment"]["dir"] = "runs"  # wherever it was made
    # one line: it is read by programs only
    (target / f"{name}.json").write_text(json.dumps(result, separators=(",", ":")) + "\n")
    steps = {
        arm: {seed: read_metrics(RunDir(paths.arm(arm) / seed_name(int(seed))).metrics) for seed in each["runs"]}
        for arm, each in result["arms"].items()
    }
    compact = {
        arm: {seed: {c: [rounded(line.get(c)) for line in lines] for c in COLUMNS} for seed, lines in each.items()}
        for arm, each in steps.items()
    }
    with gzip.GzipFile(target / f"{name}-steps.json.gz", "wb", mtime=0) as file:
        file.write(json.dumps(compact, separators=(",", ":")).encode())
    draw(result, steps, target / f"{name}-dynamics.png")
    print(f"{target}: {', '.join(sorted(path.name for path in target.glob(f'{name}*')))}")


def rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def draw(result: Mapping[str, Any], steps: Mapping[str, Mapping[str, Sequence[Any]]], path: Path) -> None:
    """Means over seeds, against sampled tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = np.linspace(0.0, result["budget"], GRID)
    for axis, (metric, label, scale) in zip(figure.subplots(1, len(DRAWN)), DRAWN, strict=True):
        for number, (arm, runs) in enumerate(steps.items()):
            curves = []
            for lines in runs.values():
                points = [(line["ledger/sampled_tokens"], line[metric]) for line in lines if line.get(metric) is not None]
                if points:
                    x, y = np.array(points, dtype=float).T
                    # evaluations are few; steps are many and noisy: a mean over the tenth of the budget around each point
                    near = np.abs(grid[:, None] - x) <= result["budget"] / 20
                    means = (near * y).sum(1) / np.maximum(near.sum(1), 1)
                    lines_between = metric.startswith("eval/") or not near.any(axis=1).all()
                    curves.append(np.interp(grid, x, y) if lines_between else means)
            if curves:
                axis.plot(grid / 1e6, scale * np.mean(curves, axis=0), color=colour(number), label=arm, linewidth=1.5)
        axis.set_xlabel("sampled tokens, millions")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(steps), fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
