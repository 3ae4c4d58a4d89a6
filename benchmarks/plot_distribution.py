#!/usr/bin/env python
"""Draw what `python -m benchmarks distribution` has measured, and write its tables into a page of the docs.

    python -m benchmarks.plot_distribution docs/results/bench/distribution-D.json docs/results/distribution.md

writes distribution-D.png beside the JSON file (extra: plots), and replaces what stands between the two comments in the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepgrpo.lab.compare.plot import colour

BEGIN, END = "<!-- written by benchmarks/plot_distribution.py -->", "<!-- end -->"
CAUSES = ("routing", "engine", "weights", "spread", "pickle", "ray")
"""Parts of a call that are lost to distribution."""
LABELS = {
    "ideal": "ideal", "tail": "tail of one large engine", "routing": "uneven shares", "engine": "late wake-up",
    "weights": "weights taken over", "spread": "sharing out", "pickle": "pickling", "ray": "Ray, there and back",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path, help="what the benchmark has written with --json")
    parser.add_argument("page", type=Path, nargs="?", help="a page with the two comments; absent: tables are printed")
    options = parser.parse_args()
    result = json.loads(options.figures.read_text())
    draw(result, options.figures.with_suffix(".png"))
    if options.page is None:
        print(tables(result))
    else:
        write(result, options.page)


def write(result: Mapping[str, Any], path: Path) -> None:
    """The tables in place of what stands between the two comments."""
    put(tables(result), path, BEGIN)


def put(text: str, path: Path, begin: str) -> None:
    """Write a text in place of what stands in a page between the comment `begin` and `END`."""
    page = path.read_text()
    start, stop = page.index(begin) + len(begin), page.index(END)
    path.write_text(f"{page[:start]}\n\n{text}\n\n{page[stop:]}")


def arms_of(result: Mapping[str, Any], what: str) -> dict[int, Mapping[str, Mapping[str, float]]]:
    """Parts of the arms called `what_N`, by N."""
    arms = result["distribution"].items()
    return {each["workers"]: each["parts"] for name, each in arms if name.rpartition("_")[0] == what}


def median(parts: Mapping[str, Mapping[str, float]], *names: str) -> float:
    """Medians of some parts, added up."""
    return sum(parts[name]["median"] for name in names)


def lost_share(parts: Mapping[str, Mapping[str, float]]) -> float:
    """Percent of the seconds that are lost to distribution."""
    return 100 * median(parts, "lost") / median(parts, "seconds")


# ---------------------------------------------------------------- tables


def tables(result: Mapping[str, Any]) -> str:
    engine, machine = result["engine"], result["machine"]
    return "\n\n".join(
        [
            f"Workload {result['workload']['name']}, {engine['rows']} rows per worker, {1e3 * engine['latency_s']:g} ms per "
            f"token; medians of {result['repeats']} rounds with their range. {machine['cores']} cores of "
            f"{machine['processor']}, load {machine['load']:.1f} at the end, Ray {result['versions'].get('ray', '?')}."
            + (" **Other things were running: provisional.**" if machine["load"] > machine["cores"] else ""),
            "**Sampling: rollouts, then branches.** Seconds; what is lost, by cause, in milliseconds (each its own median).",
            sampling_table(result),
            "**The same, call by call.** Milliseconds lost.",
            rounds_table(result),
            "**A whole step**, lengths spread, one learner. Seconds.",
            step_table(result),
            "**A call that carries next to nothing, and new weights.** Milliseconds.",
            weights_table(result),
        ]
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Markdown; all columns but the first ones are aligned to the right."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def spread_of(part: Mapping[str, float], unit: float = 1.0, digits: int = 2) -> str:
    low, mid, high = (f"{unit * part[key]:.{digits}f}" for key in ("min", "median", "max"))
    return f"{mid} ({low}–{high})"


def sampling_table(result: Mapping[str, Any]) -> str:
    causes = (f"{LABELS[cause]}, ms" for cause in CAUSES)
    head = ["lengths", "workers", "seconds", "ideal", "tail", "lost, ms", *causes, "lost, %"]
    rows = []
    for shape in ("equal", "spread"):
        for workers, parts in arms_of(result, shape).items():
            lost = median(parts, "lost")
            rows.append(
                [
                    shape, str(workers), spread_of(parts["seconds"], digits=3), f"{median(parts, 'ideal'):.3f}",
                    f"{median(parts, 'tail'):.3f}", f"**{1e3 * lost:.1f}**",
                    *(f"{1e3 * median(parts, cause):.1f}" for cause in CAUSES), f"{lost_share(parts):.1f}",
                ]
            )  # fmt: skip
    return table(head, rows)


def rounds_table(result: Mapping[str, Any]) -> str:
    rows = []
    for shape in ("equal", "spread"):
        for workers, parts in arms_of(result, shape).items():
            if workers:
                cells = [shape, str(workers)]
                for call in ("rollouts", "branches"):
                    if f"{call}/seconds" in parts:
                        lost, routing, sent = (median(parts, f"{call}/{name}") for name in ("lost", "routing", "sent_bytes"))
                        cells += [f"{1e3 * lost:.1f}", f"{1e3 * routing:.1f}", f"{sent / 1e3:.0f}"]
                    else:
                        cells += [""] * 3
                rows.append(cells)
    what = ("lost", "of it uneven shares", "kB sent")
    names = (f"{call}: {each}" for call in ("rollouts", "branches") for each in what)
    return table(["lengths", "workers", *names], rows)


def step_table(result: Mapping[str, Any]) -> str:
    found = arms_of(result, "step")
    rows = []
    for workers, parts in found.items():
        # one process: what learning and all else take there
        apart = median(parts, "learn", "other") - median(found[0], "learn", "other") if 0 in found else float("nan")
        rows.append(
            [
                str(workers), spread_of(parts["seconds"]), f"{median(parts, 'sample'):.3f}",
                f"{median(parts, 'ideal', 'tail'):.3f}", f"{median(parts, 'lost'):.3f}",
                spread_of(parts["learn"]), spread_of(parts["other"]), f"{apart:+.2f}",
            ]
        )  # fmt: skip
    last = "learning and all else, above 0 workers"
    head = ["workers", "step", "sampling", "ideal + tail", "lost in sampling", "learning", "all else", last]
    return table(head, rows, words=0)


def weights_table(result: Mapping[str, Any]) -> str:
    sizes = list(dict.fromkeys(name.split("_")[1] for name in result["distribution"] if name.startswith("weights_")))
    calls, weights = arms_of(result, "call"), {size: arms_of(result, f"weights_{size}") for size in sizes}
    head, rows = ["workers", "one token: lost"], []
    for size in sizes:
        carried = max(median(parts, "weights_bytes") for parts in weights[size].values())
        head += [f"{size} ({carried / 1e6:,.0f} MB): into the store", "taken over", "both, and a token"]
    for workers in sorted({*calls, *(n for each in weights.values() for n in each)}):
        row = [str(workers)]
        row.append(f"{1e3 * median(calls[workers], 'lost'):.1f}" if workers in calls else "")
        for size in sizes:
            parts = weights[size].get(workers)
            row += [spread_of(parts[name], 1e3, 1) for name in ("put", "weights", "seconds")] if parts else [""] * 3
        rows.append(row)
    return table(head, rows, words=0)


# ---------------------------------------------------------------- picture


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Four panels: seconds of sampling, what of them is lost and to what, a whole step, new weights."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    (first, second), (third, fourth) = figure.subplots(2, 2)
    sampling = {f"{shape}\n{n}": parts for shape in ("equal", "spread") for n, parts in arms_of(result, shape).items()}
    shown = {"ideal": ("ideal", 2), "tail": (LABELS["tail"], 1), "lost": ("lost to distribution", 4)}
    stack(first, sampling, shown, 1.0, lambda parts: f"{lost_share(parts):.1f}%")
    titled(first, "Rollouts and branches: seconds, and the share that is lost", "seconds", "lengths, rollout workers")
    clustered = {name: parts for name, parts in sampling.items() if not name.endswith("\n0")}
    colours = {cause: (LABELS[cause], number) for number, cause in zip((1, 7, 6, 3, 5, 4), CAUSES, strict=True)}
    used = {cause: at for cause, at in colours.items() if any(abs(median(p, cause)) > 5e-5 for p in clustered.values())}
    stack(second, clustered, used, 1e3, lambda parts: f"{1e3 * median(parts, 'lost'):.0f}")
    titled(second, "What is lost there, by cause", "milliseconds", "lengths, rollout workers")
    steps = {
        str(n): {**parts, "best": {"median": median(parts, "ideal", "tail")}} for n, parts in arms_of(result, "step").items()
    }
    shown = {
        "best": ("sampling: ideal and tail", 2), "lost": ("sampling: lost", 4), "learn": ("learning", 5),
        "other": ("all else", 7),
    }  # fmt: skip
    stack(third, steps, shown, 1.0, lambda parts: f"{parts['seconds']['median']:.1f}")
    titled(third, "A whole step, lengths spread", "seconds", "rollout workers (0: all in one process)")
    sent = {
        f"{n}\n{name.split('_')[1]}": each["parts"]
        for name, each in result["distribution"].items() if name.startswith("weights_") for n in (each["workers"],)
    }  # fmt: skip
    stack(
        fourth, sent, {"put": ("into the object store", 3), "weights": ("taken over by the last worker", 6)}, 1e3,
        lambda parts: f"{1e3 * median(parts, 'put', 'weights'):.0f}",
    )  # fmt: skip
    titled(fourth, "New weights, once a step", "milliseconds", "rollout workers, parameters")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def stack(axis: Any, bars: Mapping[str, Any], shown: Mapping[str, tuple[str, int]], unit: float, label: Any) -> None:
    """A bar for each name, the medians of its parts upon each other; what is below zero hangs below; a label above."""
    tops, floors = dict.fromkeys(bars, 0.0), dict.fromkeys(bars, 0.0)
    for part, (text, number) in shown.items():
        heights = {name: unit * median(parts, part) for name, parts in bars.items()}
        starts = [tops[name] if height >= 0 else floors[name] for name, height in heights.items()]
        axis.bar(list(bars), list(heights.values()), bottom=starts, color=colour(number), label=text, width=0.7)
        for name, height in heights.items():
            (tops if height >= 0 else floors)[name] += height
    for place, (name, parts) in enumerate(bars.items()):
        axis.annotate(label(parts), (place, tops[name]), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    # room for the legend above the bars
    axis.set_ylim(min(0.0, 1.3 * min(floors.values())), 1.3 * max(tops.values()))


def titled(axis: Any, title: str, y: str, x: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_ylabel(y)
    axis.set_xlabel(x)
    axis.grid(alpha=0.3, axis="y")
    axis.set_axisbelow(True)
    axis.legend(fontsize=8, frameon=False, loc="upper left", ncols=3)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
