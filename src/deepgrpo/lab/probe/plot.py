"""Plot of a probe: rescue by depth, mixed groups per token by depth, Q for each gamma."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deepgrpo.explore.recoverability import Recoverability
from deepgrpo.lab.probe.findings import Findings

BLUE, RUST, GREY = "#2f6f8f", "#b05a3c", "#777777"


def draw(findings: Findings, path: Path, title: str) -> None:
    """Write a PNG file. Raises OSError if it cannot be written; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rescue, mixed, q) = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    _rescue(rescue, findings)
    _mixed(mixed, findings)
    _q(q, findings)
    for axis in (rescue, mixed, q):
        axis.set_xlim(0, 1)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("depth ratio r (open markers: the prompt)")
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, format="png", dpi=130)
    pyplot.close(figure)


def _rescue(axis: Any, findings: Findings) -> None:
    r = [band.ratio for band in findings.bands]
    for name, label, colour in (("rescue", "rescued (≥ 1 of K)", BLUE), ("success", "continuations that succeed", RUST)):
        shares = [getattr(band, name) for band in findings.bands]
        middle = [share.rate for share in shares]
        ends = [[s.rate - s.low for s in shares], [s.high - s.rate for s in shares]]
        _points(axis, r, middle, np.clip(ends, 0, None), colour, label)
    fit = findings.fit
    if fit.fitted:
        depth = np.linspace(0.01, 1, 100)
        curve = Recoverability(w=fit.w, b=fit.b, fitted=True).probability(depth)
        axis.plot(depth, curve, ":", color=BLUE, label=f"fit: w {fit.w:.2f}, b {fit.b:.2f}")
    axis.set_ylim(0, 1.02)
    axis.set_ylabel("share, 95% intervals")


def _mixed(axis: Any, findings: Findings) -> None:
    bands = findings.bands
    middle = [band.mixed_per_1k for band in bands]
    ends = [[b.mixed_per_1k - b.mixed_low for b in bands], [b.mixed_high - b.mixed_per_1k for b in bands]]
    _points(axis, [band.ratio for band in bands], middle, np.clip(ends, 0, None), BLUE, "measured at this depth")
    axis.axhline(middle[0], ls="--", lw=1, color=GREY, label="at the prompt")
    for gamma in findings.gammas:
        axis.plot(gamma.depth, gamma.mixed_per_1k, "x", color=RUST)
        axis.annotate(f"γ {gamma.gamma:g}", (gamma.depth, gamma.mixed_per_1k), (3, 3), textcoords="offset points", fontsize=7)
    if findings.gammas:
        axis.plot([], [], "x", color=RUST, label="expected under Q, at its mean depth")
    axis.set_ylabel("mixed groups per 1,000 sampled tokens")


def _q(axis: Any, findings: Findings) -> None:
    for number, gamma in enumerate(findings.gammas):
        r = [band.ratio for band in findings.bands]
        shade = number / max(1, len(findings.gammas) - 1)
        label = f"γ {gamma.gamma:g}: × {gamma.gain:.2f} [{gamma.gain_low:.2f}, {gamma.gain_high:.2f}]"
        shares = [gamma.q[band.band] for band in findings.bands]
        axis.plot(r, shares, "o-", ms=3, color=(0.18 + 0.6 * shade, 0.45 - 0.1 * shade, 0.6 - 0.4 * shade), label=label)
    axis.set_ylabel("share of pivots, Q")


def _points(axis: Any, x: Any, y: Any, ends: Any, colour: str, label: str) -> None:
    """Error bars with a line through the bands; the prompt, which comes first, is drawn apart."""
    style = {"color": colour, "capsize": 2, "lw": 1}
    axis.errorbar(x[1:], y[1:], np.asarray(ends)[:, 1:], fmt="o-", ms=4, label=label, **style)
    axis.errorbar(x[:1], y[:1], np.asarray(ends)[:, :1], fmt="o", ms=6, mfc="white", **style)
