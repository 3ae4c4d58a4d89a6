#!/usr/bin/env python
"""Map of experiments: regimes × strategies, differences to the baseline at equal tokens and at equal steps.

    python -m benchmarks.map runs/saturation_strict runs/recovery runs/facts --out docs/results/map

reads figures.json of each finished `deepgrpo compare` (a regime: one experiment) and writes map.png and map.md. An arm is a
column; arms of the same name in several experiments share one.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgrpo.lab.compare.cells import ComparisonTable, markdown_table, percent, whole
from deepgrpo.lab.compare.grid import label
from deepgrpo.lab.compare.layout import ExperimentDir

TOKENS, STEPS = "final/greedy", "pair/greedy"
"""Metrics of the two panels: untouched questions after the budget; watched ones at the fewest steps of arm and baseline."""
NO_COLOUR = "#f2f2f2"


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean paired difference to the baseline. Example: Difference(0.031, 0.004, 0.052, pairs=8, above=7, below=1, p=0.07)."""

    mean: float
    low: float
    high: float
    pairs: int
    above: int
    below: int
    p: float

    @property
    def clear(self) -> bool:
        """True if the interval leaves out 0; with fewer than 6 pairs none is a 95% interval."""
        return self.pairs >= 6 and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, slots=True)
class Regime:
    """One experiment: its figures.json."""

    name: str
    baseline: str
    found: Mapping[str, Any]

    def arms(self) -> list[str]:
        return list(dict.fromkeys(row["arm"] for row in self.found["rows"]))

    def row(self, arm: str, metric: str) -> Mapping[str, Any] | None:
        return next((row for row in self.found["rows"] if (row["arm"], row["metric"]) == (arm, metric)), None)

    def mean(self, arm: str, metric: str) -> float | None:
        row = self.row(arm, metric)
        return None if row is None else row["mean"]

    def seeds(self, arm: str) -> int:
        return next((row["seeds"] for row in self.found["rows"] if row["arm"] == arm), 0)

    def difference(self, arm: str, metric: str) -> Difference | None:
        row = self.row(arm, metric)
        if row is None or "difference" not in row:
            return None
        keys = ("difference", "low", "high", "pairs", "above", "below", "sign_p")
        return Difference(*(row[key] for key in keys))

    def chosen(self, arm: str) -> str:
        """The tuned values, with an asterisk at the edge of the grid; "shared" without tuning."""
        if arm not in self.found["chosen"]:
            return "shared"
        edges = self.found["edges"].get(arm, [])
        values = self.found["chosen"][arm].items()
        short = {key: key.rpartition(".")[2] for key, _ in values}
        return ", ".join(f"{short[key]} {label(value)}{'*' if key in edges else ''}" for key, value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", type=Path, nargs="+", help="directories of experiments, in the order of the rows")
    parser.add_argument("--out", type=Path, default=Path("map"), help="path of the results without its ending")
    parser.add_argument("--tokens", default=TOKENS, help=f"metric at equal tokens (default: {TOKENS})")
    parser.add_argument("--steps", default=STEPS, help=f"metric at equal steps (default: {STEPS})")
    options = parser.parse_args()
    regimes = [read_regime(path) for path in options.experiments]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table, picture = options.out.with_suffix(".md"), options.out.with_suffix(".png")
    text = page(regimes, options.tokens, options.steps)
    table.write_text(f"{text}\n![Differences to the baseline]({picture.name})\n", encoding="utf-8")
    draw(regimes, options.tokens, options.steps, picture)
    print(f"{table}, {picture}: {len(regimes)} regimes × {len(columns(regimes))} arms")


def read_regime(directory: Path) -> Regime:
    """The regime of an experiment's directory, or of a figures.json given by its path."""
    path = directory if directory.suffix == ".json" else ExperimentDir(directory).figures
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{path} does not exist; `deepgrpo compare` writes it once a run is finished") from None
    return Regime(found["name"], found["baseline"], found)


def columns(regimes: Sequence[Regime]) -> list[str]:
    """Arms in the order of their first appearance, without those that are a baseline everywhere."""
    arms = dict.fromkeys(arm for regime in regimes for arm in regime.arms())
    return [arm for arm in arms if any(arm in regime.arms() and arm != regime.baseline for regime in regimes)]


# ---------------------------------------------------------------- page


def page(regimes: Sequence[Regime], tokens: str, steps: str) -> str:
    """The table: one row per regime and arm."""
    rows = []
    for regime in regimes:
        for arm in regime.arms():
            spent, epochs = regime.mean(arm, "spent/optimizer_steps"), regime.mean(arm, "spent/epochs")
            first, second = regime.mean(arm, tokens), regime.mean(arm, steps)
            rows.append(
                (
                    regime.name, arm, str(regime.seeds(arm)), regime.chosen(arm),
                    "–" if first is None else percent(first), cell(regime, arm, tokens),
                    "–" if second is None else percent(second), cell(regime, arm, steps),
                    "–" if spent is None else whole(spent), "" if epochs is None else f"{epochs:.1f}",
                )
            )  # fmt: skip
    head = (
        "regime", "arm", "seeds", "tuned", f"{tokens}, %", "difference at equal tokens", f"{steps}, %",
        "difference at equal steps", "steps", "epochs",
    )  # fmt: skip
    budgets = [
        f"- {regime.name}: {regime.found['budget']:,} sampled tokens; the fewest optimizer steps of any run are "
        f"{regime.found['optimizer_steps']:.0f}"
        for regime in regimes
    ]
    return "\n".join(
        [
            "# Map of regimes and arms", "",
            "Differences in points to the baseline of the regime, paired by seed [95% interval] (seeds above/below, p of the "
            "sign test); bold where the interval leaves out 0. An asterisk: the tuned value is at the edge of its grid.", "",
            *budgets, "",
            *markdown_table(ComparisonTable("", head, tuple(rows))), "",
        ]
    )  # fmt: skip


def cell(regime: Regime, arm: str, metric: str) -> str:
    if arm == regime.baseline:
        return "baseline"
    found = regime.difference(arm, metric)
    if found is None:
        return "–"
    mean, low, high = (f"{100 * value:+.1f}" for value in (found.mean, found.low, found.high))
    steps = (regime.row(arm, metric) or {}).get("steps")
    shown = f"{mean} [{low}, {high}] ({found.above}/{found.below}, {found.p:.2g})" + (f" at {steps:.0f}" if steps else "")
    return f"**{shown}**" if found.clear else shown


# ---------------------------------------------------------------- picture


def draw(regimes: Sequence[Regime], tokens: str, steps: str, path: Path) -> None:
    """Two panels of cells; a cell is coloured by its difference, palely where the interval includes 0."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    arms = columns(regimes)
    figure = Figure(figsize=(2.2 + 1.02 * len(arms), 0.9 + 1.24 * len(regimes)), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1)
    _panel(top, regimes, arms, tokens, "at equal sampled tokens")
    _panel(bottom, regimes, arms, steps, "at equal optimizer steps")
    with io.BytesIO() as whole_colours:
        figure.savefig(whole_colours, dpi=100, metadata={"Software": None})
        Image.open(whole_colours).convert("RGB").quantize(64).save(path, optimize=True)  # a quarter of the size


def _panel(axis: Any, regimes: Sequence[Regime], arms: Sequence[str], metric: str, title: str) -> None:
    from matplotlib.patches import Rectangle

    found = {(row, column): regime.difference(arm, metric)
             for row, regime in enumerate(regimes) for column, arm in enumerate(arms)}  # fmt: skip
    largest = max((abs(each.mean) for each in found.values() if each is not None), default=0.0) or 1.0
    for (row, column), each in found.items():
        is_baseline = arms[column] == regimes[row].baseline
        face = NO_COLOUR if each is None else _colour(each, largest)
        axis.add_patch(Rectangle((column, row), 0.96, 0.92, facecolor=face, edgecolor="none"))
        middle = column + 0.48
        if each is None:
            axis.text(middle, row + 0.46, "baseline" if is_baseline else "", ha="center", va="center", fontsize=8, color="grey")
            continue
        ink = "white" if each.clear and abs(each.mean) > 0.55 * largest else "black"
        weight = "bold" if each.clear else "normal"
        axis.text(middle, row + 0.3, f"{100 * each.mean:+.1f}", ha="center", va="center", fontsize=11, weight=weight, color=ink)
        axis.text(middle, row + 0.68, f"[{100 * each.low:+.1f}, {100 * each.high:+.1f}]", ha="center", va="center", fontsize=8,
                  color=ink)  # fmt: skip
    names = []
    for regime in regimes:
        mean = regime.mean(regime.baseline, metric)
        level = "" if mean is None else f" {percent(mean)}%"
        names.append(f"{regime.name}\n{regime.baseline}{level}, {regime.seeds(regime.baseline)} seeds")
    axis.set_xlim(0, len(arms))
    axis.set_ylim(len(regimes), 0)
    axis.set_xticks([i + 0.48 for i in range(len(arms))], arms, fontsize=8)
    axis.set_yticks([i + 0.46 for i in range(len(regimes))], names, fontsize=8)
    axis.tick_params(length=0, labeltop=True, labelbottom=False, top=False)
    said = f"points against the baseline {title} ({metric}); bold: the 95% interval leaves out 0"
    axis.set_title(said, fontsize=9, loc="left")
    for side in axis.spines.values():
        side.set_visible(False)


def _colour(found: Difference, largest: float) -> tuple[float, float, float]:
    """Blue above the baseline, orange below it (Okabe and Ito); a third as strong where the interval includes 0."""
    strength = min(1.0, abs(found.mean) / largest) * (1.0 if found.clear else 0.35)
    end = (0.0, 0.447, 0.698) if found.mean > 0 else (0.835, 0.369, 0.0)
    red, green, blue = (1.0 + strength * (channel - 1.0) for channel in end)
    return red, green, blue


if __name__ == "__main__":
    main()
