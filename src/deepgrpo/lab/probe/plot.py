"""Plot of a probe: cosine of a step and snr² per token of each strategy, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepgrpo.lab.probe.findings import Figure, Findings

BLUE, RUST = "#2f6f8f", "#b05a3c"


def draw(findings: Findings, path: Path, title: str) -> None:
    """Write a PNG file. Raises OSError if it cannot be written; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = findings.arms
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 1.4 + 0.35 * len(arms)), layout="constrained", sharey=True)
    figure.suptitle(title, fontsize=10)
    _dots(axes[0], [arm.cos for arm in arms], "cosine of a step with the true gradient", BLUE)
    _dots(axes[1], [arm.snr for arm in arms], "snr² per 1,000 sampled tokens", BLUE)
    _dots(axes[2], [arm.mixed for arm in arms], "mixed groups per 1,000 tokens", RUST)
    axes[0].set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes[0].invert_yaxis()
    figure.savefig(path, format="png", dpi=130)
    pyplot.close(figure)


def _dots(axis: Any, figures: Sequence[Figure], label: str, colour: str) -> None:
    for place, each in enumerate(figures):
        axis.plot([each.low, each.high], [place, place], color=colour, lw=1.5)
        axis.plot(each.value, place, "o", color=colour, ms=5)
    axis.axvline(0, color="#bbbbbb", lw=0.8, zorder=0)
    axis.set_xlabel(f"{label}, 95%", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
