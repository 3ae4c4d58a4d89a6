"""Plot of a comparison: curves over both axes, and differences with their intervals. Needs the extra `plots`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's palette, distinguishable with any colour vision; then matplotlib's
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999")
_GRID = 60
"""Grid points of the mean curve over seeds."""


def colour(number: int) -> str:
    """Colour of an arm by its position in the experiment file, the same in every plot."""
    return _COLOURS[number] if number < len(_COLOURS) else f"C{number}"


def can_draw() -> bool:
    """True if matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: watched greedy accuracy over sampled tokens and over optimizer steps, final differences.

    Lines are means over seeds, interpolated linearly between evaluations; the shade spans the lowest to the highest seed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = {arm: each for arm, each in result["arms"].items() if each["curve"]}
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    colours = {arm: colour(i) for i, arm in enumerate(arms)}
    steps = result["optimizer_steps_compared"]
    for axis, spent, end, label in (
        (left, "sampled_tokens", result["budget"], "sampled tokens, millions"),
        (middle, "optimizer_steps", None, "optimizer steps"),
    ):
        unit = 1e6 if spent == "sampled_tokens" else 1.0
        for arm, each in arms.items():
            x, y = _mean_curve(list(each["curve"].values()), spent, end)
            axis.plot(x / unit, 100 * y.mean(axis=0), color=colours[arm], label=arm, linewidth=1.6)
            axis.fill_between(x / unit, 100 * y.min(axis=0), 100 * y.max(axis=0), color=colours[arm], alpha=0.1, linewidth=0)
        axis.set_xlabel(label)
        axis.set_ylabel("greedy accuracy on watched questions, %")
        axis.grid(alpha=0.3)
    middle.axvline(steps, color="grey", linestyle=":", linewidth=1)
    # beside the curves: inside it would cover some of them
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=max(1, min(len(arms), 12)), fontsize=8)
    _forest(right, result, arms, colours)
    seeds = len(result["experiment"]["seeds"])
    figure.suptitle(f"{result['name']}: {seeds} seeds, {result['budget']:,} sampled tokens per run", fontsize=11)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _forest(axis: Any, result: Mapping[str, Any], arms: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    """Mean paired differences with their intervals, one row per arm; the single seeds as dots."""
    shown = [(arm, each["differences"]["final/greedy"]) for arm, each in arms.items() if each.get("differences")]
    for row, (arm, found) in enumerate(reversed(shown)):
        low, mean, high = (100 * found[key] for key in ("low", "mean", "high"))
        axis.plot([low, high], [row, row], color=colours[arm], linewidth=2)
        axis.plot([mean], [row], "o", color=colours[arm])
        axis.plot([100 * v for v in found["seeds"].values()], [row - 0.2] * found["n"], "|", color=colours[arm], markersize=7)
    axis.axvline(0, color="grey", linewidth=1)
    axis.set_yticks(range(len(shown)), [arm for arm, _ in reversed(shown)])
    axis.set_xlabel(f"greedy on untouched questions, points against {result['baseline']}")
    axis.grid(alpha=0.3, axis="x")


def _mean_curve(curves: Sequence[Sequence[Mapping[str, float]]], spent: str, end: float | None) -> tuple[Any, Any]:
    """A grid from 0 to the end of the shortest curve, and the curve of every seed on it `[seeds, grid]`."""
    stop = min(curve[-1][spent] for curve in curves)
    grid = np.linspace(0.0, stop if end is None else min(stop, end), _GRID)
    return grid, np.stack(
        [np.interp(grid, [p[spent] for p in curve], [p["greedy"] for p in curve]) for curve in curves]
    )
