#!/usr/bin/env python
"""Draw the measurements of both engines and write their tables into docs/results/engines.md.

    python -m benchmarks.plot_engines SAMPLING.json STEP.json docs/results/engines.md

writes engines.png beside the JSON files (extra: plots), and replaces what stands between the two comments in the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.plot_distribution import put, table, titled
from deepgrpo.lab.compare.plot import colour

BEGIN = "<!-- written by benchmarks/plot_engines.py -->"
ENGINES = (("embedded", "engine_bf16", "tree_bf16"), ("vLLM", "vllm_bf16", "tree_vllm_bf16"))
"""Name, its arm of the benchmark of sampling, and that of the step."""
WITHOUT = {"engine_bf16": "engine_bf16_no_keep", "tree_bf16": "tree_bf16_no_keep"}
"""The same without reuse of prefixes, where it is not called `ARM_no_prefix`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sampling", type=Path, help="what `python -m benchmarks sampling` has written with --json")
    parser.add_argument("step", type=Path, help="what `python -m benchmarks step` has written with --json")
    parser.add_argument("page", type=Path, help="a page with the two comments")
    options = parser.parse_args()
    sampling, step = (json.loads(path.read_text()) for path in (options.sampling, options.step))
    draw(sampling, step, options.sampling.with_name("engines.png"))
    put(tables(sampling, step), options.page, BEGIN)


def arms_of(result: Mapping[str, Any], which: int) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Engine → its arm with and without reuse of prefixes."""
    arms = {arm["name"]: arm for arm in result["arms"]}
    found = {}
    for engine in ENGINES:
        name = engine[which]
        found[engine[0]] = arms[name], arms[WITHOUT.get(name, f"{name}_no_prefix")]
    return found


def seconds(arm: Mapping[str, Any]) -> str:
    return f"{arm['median_s']:.1f} ({arm['min_s']:.1f}–{arm['max_s']:.1f})"


def tables(sampling: Mapping[str, Any], step: Mapping[str, Any]) -> str:
    machine, work = sampling["machine"], sampling["workload"]
    about = (
        f"SmolLM2-135M in bfloat16, workload {work['name']}: {work['prompts']} prompts of {work['prompt']} tokens, "
        f"{work['rollouts']} rollouts of {work['response']} each, of which {work['failed']} failed and get {work['branches']} "
        f"branches from {work['depth']:.0%} of their length. {sampling['threads']} threads on {machine['processor']}, "
        f"torch {sampling['versions']['torch'].split('+')[0]}, vLLM {sampling['versions']['vllm']}; medians of "
        f"{sampling['repeats']} rounds (sampling; {sampling['warmup']} before them to warm up) and "
        f"{step['repeats']} (step; {step['warmup'] or 'none'} before them), with their range. The load at the end was "
        f"{machine['load']:.1f} and {step['machine']['load']:.1f}, of which {sampling['threads']} are the benchmark's own."
    )
    return "\n\n".join(
        [
            about,
            "**Sampling: rollouts, then branches.**", arms_table(arms_of(sampling, 1), rates=True),
            "**A whole step, learner in float32.**", arms_table(arms_of(step, 2), rates=False),
        ]
    )  # fmt: skip


def arms_table(found: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]], rates: bool) -> str:
    """A row for each arm, with its sampled tokens per second if `rates`."""
    base = found["embedded"][0]["median_s"]
    rows = [
        [
            engine, reuse, seconds(arm), *([f"{arm['tokens'] / arm['median_s']:,.0f}"] if rates else []),
            f"{base / arm['median_s']:.2f}×",
        ]
        for engine, pair in found.items() for arm, reuse in zip(pair, ("yes", "no"), strict=True)
    ]  # fmt: skip
    rate = ["sampled tokens per second"] if rates else []
    return table(["engine", "prefixes are reused", "seconds", *rate, "× embedded"], rows, words=2)


def draw(sampling: Mapping[str, Any], step: Mapping[str, Any], path: Path) -> None:
    """Two panels: sampled tokens per second, and seconds of a step, of both engines with and without reuse."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    panels = (
        (left, arms_of(sampling, 1), lambda arm, s: arm["tokens"] / s, "sampled tokens per second", "Sampling with branches"),
        (right, arms_of(step, 2), lambda arm, s: s, "seconds", "A whole step"),
    )
    for axis, found, value, label, title in panels:
        top = 0.0
        for number, reuse in enumerate(("prefixes reused", "each encoded again")):
            places = [i + 0.4 * (number - 0.5) for i in range(len(found))]
            arms = [pair[number] for pair in found.values()]
            middle = [value(arm, arm["median_s"]) for arm in arms]
            ends = [sorted((value(arm, arm["min_s"]), value(arm, arm["max_s"]))) for arm in arms]
            away = [[m - low for m, (low, _) in zip(middle, ends, strict=True)],
                    [high - m for m, (_, high) in zip(middle, ends, strict=True)]]  # fmt: skip
            axis.bar(places, middle, yerr=away, width=0.38, color=colour((5, 1)[number]), label=reuse, capsize=3)
            for place, height, (_, high) in zip(places, middle, ends, strict=True):
                axis.annotate(f"{height:,.0f}", (place, high), (0, 2), textcoords="offset points", ha="center", fontsize=8)
                top = max(top, high)
        axis.set_xticks(range(len(found)), list(found))
        axis.set_ylim(0, 1.25 * top)
        titled(axis, title, label, "")
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
