#!/usr/bin/env python
"""Measure and draw how the cost of a learner step grows with the branches per pivot and with the length of rollouts.

    python -m benchmarks.cost_growth docs/results/bench/growth          writes growth.json and growth.png (extra: plots)

Each point is measured once and kept in the JSON file, so an interrupted run goes on where it stopped; delete the file to
measure anew. The workload is S of `python -m benchmarks`, with one of its numbers changed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import BenchSetting
from benchmarks.suites.learner import learner_suite
from benchmarks.workloads import WORKLOADS, Workload, build_policy, build_trees
from deepgrpo.lab.machine import machine_and_versions
from deepgrpo.records import ROOT, Tree

POINTS: dict[str, tuple[int, ...]] = {"branches": (2, 4, 8, 16, 32), "response": (128, 256, 512, 1024, 2048)}
BUDGET = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="path of the results, without suffix")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="of the tree arm; the per-path arm is run once")
    parser.add_argument("--most-path-tokens", type=int, default=70_000, help="no per-path arm beyond it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stored = options.target.with_suffix(".json")
    result: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {"points": []}
    done = {(p["varied"], p["value"]) for p in result["points"]}
    for varied, values in POINTS.items():
        for value in values:
            if (varied, value) not in done:
                point = measure_point(replace(WORKLOADS["S"], **{varied: value}), options)  # type: ignore[arg-type]
                result["points"].append({"varied": varied, "value": value, **point})
                result |= {"threads": options.threads, "budget": BUDGET, **machine_and_versions()}
                stored.write_text(json.dumps(result, indent=1) + "\n")
                print(varied, value, point, flush=True)
    draw(result, options.target.with_suffix(".png"))
    for varied in POINTS:
        print(varied, {name: f"{gap:.1%}" for name, gap in deviations(result, varied).items()})


def measure_point(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both arms, and what the cost model makes of the workload."""
    with ExitStack() as closing:
        suite = learner_suite(BenchSetting(workload, BUDGET, options.threads, closing))
        arms = {offer.name: offer.make() for offer in suite.offers if offer.name in ("tree", "per_path")}
        model = suite.extra()["cost_model"]
        arms["tree"].timed()  # warms up
        tree = [arms["tree"].timed().seconds for _ in range(options.repeats)]
        slow = arms["per_path"].timed().seconds if model["path_tokens"] <= options.most_path_tokens else None
    return {
        "tree_s": statistics.median(tree), "tree_range_s": [min(tree), max(tree)], "per_path_s": slow,
        "unique_tokens": model["unique_tokens"], "path_tokens": model["path_tokens"], "terms": model["terms"],
        "operations": operations(workload),
    }  # fmt: skip


def operations(workload: Workload) -> float:
    """Floating point operations of a step on unique tokens: trunk, head, and attention.

    Attention multiplies each visible pair of query and key twice forward (4 operations per pair and channel) and, as the
    scores are computed again, five times backward (10).
    """
    policy, trees = build_policy(workload), build_trees(workload)
    shape = policy.causal.config
    unique = sum(len(t.prompt.tokens) + sum(len(n.tokens) for n in t.nodes) for t in trees)
    terms = sum(len(n.tokens) for t in trees for n in t.nodes)
    head = policy.causal.get_output_embeddings().weight.numel()
    trunk = sum(p.numel() for p in policy.model.parameters()) - head
    pairs = sum(visible_pairs(tree) for tree in trees)
    return float(6 * trunk * unique + 8 * head * terms + 14 * pairs * shape.hidden_size * shape.num_hidden_layers)


def visible_pairs(tree: Tree) -> int:
    """Query and key pairs of a tree: a token sees its whole path and itself."""
    prompt = len(tree.prompt.tokens)
    starts: list[int] = []
    total = prompt * (prompt + 1) // 2
    for node in tree.nodes:
        start = (prompt if node.parent == ROOT else starts[node.parent]) + node.offset
        starts.append(start)
        count = len(node.tokens)
        total += count * start + count * (count + 1) // 2
    return total


def deviations(result: dict[str, Any], varied: str) -> dict[str, float]:
    """Largest relative distance of the measured seconds from proportionality to a cost, best constant taken."""
    points = [p for p in result["points"] if p["varied"] == varied]
    found: dict[str, float] = {}
    for cost in ("unique_tokens", "operations"):
        rates = [p["tree_s"] / p[cost] for p in points]
        middle = (max(rates) + min(rates)) / 2  # the constant whose largest relative error is smallest
        found[cost] = max(abs(rate / middle - 1) for rate in rates)
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """Seconds against branches and against length, both arms, beside a line proportional to the unique tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = {"branches": "branches per pivot (rollouts of 256)", "response": "tokens of a rollout (8 branches per pivot)"}
    for axis, (varied, label) in zip(axes, labels.items(), strict=True):
        points = [p for p in result["points"] if p["varied"] == varied]
        x = [p["value"] for p in points]
        rate = statistics.median(p["tree_s"] / p["unique_tokens"] for p in points)
        slow = [(p["value"], p["per_path_s"]) for p in points if p["per_path_s"] is not None]
        axis.plot(*zip(*slow, strict=True), "s-", color="#b05a3c", label="a row per path")
        axis.plot(x, [p["tree_s"] for p in points], "o-", color="#2f6f8f", label="tree packs")
        axis.plot(x, [rate * p["unique_tokens"] for p in points], ":", color="black", label="proportional to unique tokens")
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds of a learner step")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(ScalarFormatter())
            side.set_minor_formatter(NullFormatter())
        axis.set_xticks(x)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
