#!/usr/bin/env python
"""Before any reinforcement: from which depth can failed rollouts be saved, and where are mixed groups cheap?

    python -m benchmarks.static_depth docs/results/lab/static_depth --runs runs/static_depth   writes .json, .md, .png

The task of the demo, warm-started until 20, 45 and 70% of the sampled responses are right, with several seeds each; then
`deepgrpo probe`. What has been made is kept, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepgrpo.lab.compare.jobs import Job, Jobs
from deepgrpo.lab.machine import machine_and_versions
from deepgrpo.runs.layout import RunDir
from deepgrpo.stats import wilson_interval

STRENGTHS = (0.2, 0.45, 0.7)
COLOURS = ("#D55E00", "#0072B2", "#009E73")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="path of the results, without suffix")
    parser.add_argument("--runs", type=Path, default=Path("runs/static_depth"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[41, 42, 43])
    parser.add_argument("--rollouts", type=int, default=256, help="failed ones of each policy")
    parser.add_argument("--workers", type=int, default=2, help="policies at a time")
    options = parser.parse_args()
    jobs = [job for strength in STRENGTHS for seed in options.seeds for job in two_jobs(options, strength, seed)]
    Jobs(jobs, workers=options.workers).run(lambda job, state: print(job.name, state, flush=True))
    found = {
        f"{strength:g}": [json.loads(probe_file(options, strength, seed).read_text()) for seed in options.seeds]
        for strength in STRENGTHS
    }
    result = {
        "strengths": {name: pooled(probes) for name, probes in found.items()}, "seeds": options.seeds,
        "rollouts": options.rollouts, **machine_and_versions(),
    }  # fmt: skip
    options.target.parent.mkdir(parents=True, exist_ok=True)
    options.target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    options.target.with_suffix(".md").write_text(text)
    print(text)
    draw(result, options.target.with_suffix(".png"))


def probe_file(options: argparse.Namespace, strength: float, seed: int) -> Path:
    path: Path = options.runs / f"probe-{strength:g}-{seed}.json"
    return path


def two_jobs(options: argparse.Namespace, strength: float, seed: int) -> list[Job]:
    """The warm start and the probe of one policy."""
    name, probe = f"warm-{strength:g}-{seed}", probe_file(options, strength, seed)
    start = RunDir(options.runs / name).start
    train = (
        "deepgrpo.cli", "train", "demo", "--run.dir", str(options.runs), "--run.name", name, "--run.seed", str(seed),
        "--data.seed", str(seed), "--run.steps", "0", "--warmstart.target_accuracy", f"{strength}",
    )  # fmt: skip
    ask = (
        "deepgrpo.cli", "probe", str(options.runs / name), "--rollouts", str(options.rollouts), "--depths", "7",
        "--json", str(probe),
    )  # fmt: skip
    return [
        Job(name, train, options.runs / f"{name}.log", finished=start.is_dir),
        Job(probe.stem, ask, options.runs / f"{probe.stem}.log", finished=probe.is_file, after=(name,)),
    ]


def pooled(probes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of several policies of one strength, band by band; the prompt is band 0."""
    bands = []
    for number in sorted({band["band"] for probe in probes for band in probe["depths"]}):
        mine = [band for probe in probes for band in probe["depths"] if band["band"] == number]
        states = sum(band["states"] for band in mine)
        rescued = sum(band["rescue"]["rate"] * band["states"] for band in mine)
        mixed, tokens = sum(band["mixed"] for band in mine), sum(band["tokens"] * band["states"] for band in mine)
        bands.append(
            {
                "band": number, "ratio": sum(b["ratio"] * b["states"] for b in mine) / states, "states": states,
                "rescued": rescued / states, "interval": wilson_interval(round(rescued), states),
                "succeed": sum(b["success"]["rate"] * b["states"] for b in mine) / states,
                "mixed": mixed / states, "mixed_per_1k": 1000 * mixed / tokens,
                "seeds_mixed_per_1k": [b["mixed_per_1k"] for b in mine],
            }
        )  # fmt: skip
    responses = sum(probe["sampled"]["rollouts"] for probe in probes)
    failed = sum(probe["sampled"]["failed"] for probe in probes)
    return {
        "sampled_accuracy": 1 - failed / responses, "bands": bands,
        "w": [probe["fit"]["w"] for probe in probes], "b": [probe["fit"]["b"] for probe in probes],
        "verdicts": [probe["verdict"] for probe in probes],
        "recommended_gamma": [probe["recommended_gamma"] for probe in probes],
        "gammas": [
            {
                "gamma": gamma["gamma"], "gain": statistics.fmean(p["gammas"][i]["gain"] for p in probes),
                "seeds": [p["gammas"][i]["gain"] for p in probes],
            }
            for i, gamma in enumerate(probes[0]["gammas"])
        ],
    }  # fmt: skip


def markdown(result: Mapping[str, Any]) -> str:
    lines = ["| sampled accuracy | depth r | states | rescued, % | succeed, % | mixed, % | mixed per 1k tokens | × prompt |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for each in result["strengths"].values():
        root = each["bands"][0]["mixed_per_1k"]
        for band in each["bands"]:
            low, high = band["interval"]
            place = "prompt" if band["band"] == 0 else f"{band['ratio']:.2f}"
            lines.append(
                f"| {each['sampled_accuracy']:.0%} | {place} | {band['states']} | {100 * band['rescued']:.0f} "
                f"[{100 * low:.0f}, {100 * high:.0f}] | {100 * band['succeed']:.1f} | {100 * band['mixed']:.0f} | "
                f"{band['mixed_per_1k']:.2f} | {band['mixed_per_1k'] / root:.2f} |"
            )
    lines += ["", "| sampled accuracy | w, by seed | b, by seed | gain of gamma 0 / 1 / 2 / 3 | recommended |"]
    lines.append("|---|---|---|---|---|")
    for each in result["strengths"].values():
        gains = {g["gamma"]: g["gain"] for g in each["gammas"]}
        lines.append(
            f"| {each['sampled_accuracy']:.0%} | {', '.join(f'{w:.1f}' for w in each['w'])} | "
            f"{', '.join(f'{b:.1f}' for b in each['b'])} | {' / '.join(f'{gains[g]:.2f}' for g in (0, 1, 2, 3))} | "
            f"{', '.join('none' if g is None else f'{g:g}' for g in each['recommended_gamma'])} |"
        )
    return "\n".join(lines) + "\n"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Three pictures by depth: rescue, mixed groups per token, and Q for the fitted recoverability."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    rescue, mixed, q = figure.subplots(1, 3)
    for colour, each in zip(COLOURS, result["strengths"].values(), strict=True):
        label = f"{each['sampled_accuracy']:.0%} of samples right"
        root, deep = each["bands"][0], each["bands"][1:]
        r = [band["ratio"] for band in deep]
        rescue.plot(r, [100 * band["rescued"] for band in deep], "o-", color=colour, label=label)
        for band in deep:
            rescue.plot([band["ratio"]] * 2, [100 * end for end in band["interval"]], color=colour, linewidth=1)
        rescue.plot(root["ratio"], 100 * root["rescued"], "s", mfc="white", color=colour)
        mixed.plot(r, [band["mixed_per_1k"] for band in deep], "o-", color=colour, label=label)
        mixed.plot(root["ratio"], root["mixed_per_1k"], "s", mfc="white", color=colour)
        mixed.axhline(root["mixed_per_1k"], color=colour, linewidth=0.8, linestyle=":")
        w, b = statistics.fmean(each["w"]), statistics.fmean(each["b"])
        chain = [(i + 1) / 8 for i in range(7)]
        for gamma, style in ((2.0, "-"), (0.0, ":")):
            weights = [d**gamma / (1 + math.exp(-(w * d + b))) for d in chain]
            name = f"γ {gamma:g}, w {w:.1f}, b {b:.1f}"
            q.plot(chain, [100 * v / sum(weights) for v in weights], style, color=colour, label=name)
    for axis, label in ((rescue, "failed rollouts saved by one of 8, %"), (mixed, "mixed groups per 1,000 sampled tokens"),
                        (q, "share of pivots, Q, %")):  # fmt: skip
        axis.set_xlabel("depth r of the state" + ("" if axis is q else " (square: the prompt)"))
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    seeds = len(result["seeds"])
    said = f"{seeds} policies each, {result['rollouts']} failed rollouts per policy"
    figure.suptitle(f"Six chained operations, 0.22M parameters: {said}")
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
