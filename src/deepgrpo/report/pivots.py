"""Pivot figures: the mass of Q by depth, the rescue rate by depth, and the reliability of P(success | r).

    reliability   a pivot of step t is predicted by the fit after step t - 1, which had not seen it
    Q over depth  mass of Q in each tenth of the depth ratio, averaged over the expanded rollouts
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepgrpo.records import Pivot, Tree
from deepgrpo.runs.facts import DEPTH_BINS, depth_bin, succeeds
from deepgrpo.stats import clustered_proportion

PREDICTION_BINS = 10
"""Bins of the predicted probability in the reliability diagram."""
COLUMNS = 60
"""Maximum number of columns of a heat map; neighbouring steps are merged."""

Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PivotOutcome:
    """An expanded pivot. Example: PivotOutcome(step=12, prompt="q7", ratio=0.6, success=True)."""

    step: int
    prompt: str
    ratio: float
    success: bool
    """True if at least one branch succeeds: the label of the fit."""


def pivot_outcomes(tree: Tree, step: int, threshold: float) -> list[PivotOutcome]:
    """The pivots of a tree in the branch stream."""
    return [
        PivotOutcome(step, tree.prompt.id, pivot.ratio, succeeds(tree, index, threshold))
        for index, pivot in enumerate(tree.pivots)
        if pivot.stream == "branch" and pivot.ratio > 0
    ]


def candidate_ratios(pivot: Pivot) -> list[float]:
    """Depth ratios of a pivot's candidates. The pivot's own ratio determines the length of the chain.

    `r = (index in the chain + 1) / length`; the root has index 0. Candidates (0, 10, 20, 30) with the pivot at 20 and
    r = .6 are at .2, .4, .6, .8. Without the root, (10, 20, 30) are at .4, .6, .8.
    """
    if pivot.offset not in pivot.candidates or pivot.ratio <= 0:
        return []
    first = 0 if pivot.candidates[0] == 0 else 1
    length = max(1, round((pivot.candidates.index(pivot.offset) + first + 1) / pivot.ratio))
    return [(place + first + 1) / length for place in range(len(pivot.candidates))]


def q_mass(trees: Iterable[Tree]) -> tuple[list[float], int]:
    """Mean mass of Q in each tenth of the depth, `[10]`, and the number of rollouts it is based on.

    A rollout counts once however many pivots were drawn in it, since they share one Q. The oracle has a single candidate
    and no distribution; its rollouts are left out.
    """
    mass, rollouts = [0.0] * DEPTH_BINS, 0
    for tree in trees:
        done: set[int] = set()
        for pivot in tree.pivots:
            ratios = candidate_ratios(pivot)
            if pivot.stream != "branch" or len(ratios) < 2 or pivot.parent in done or len(ratios) != len(pivot.q):
                continue
            done.add(pivot.parent)
            rollouts += 1
            for ratio, q in zip(ratios, pivot.q, strict=True):
                mass[depth_bin(ratio)] += q
    return [each / rollouts if rollouts else 0.0 for each in mass], rollouts


def q_over_time(masses: Mapping[int, tuple[list[float], int]]) -> Table | None:
    """Q by depth, one column per saved step or group of steps; None if no pivot was drawn from a Q."""
    steps = [step for step, (_, rollouts) in sorted(masses.items()) if rollouts]
    if not steps:
        return None
    table = columns(steps, [list(masses[s][0]) for s in steps], [[masses[s][1]] * DEPTH_BINS for s in steps])
    # blank marks a depth without any state, as opposed to states that are hardly ever drawn
    there = [any(masses[step][0][row] > 0 for step in steps) for row in range(DEPTH_BINS)]
    table["cells"] = [[mass if known else None for mass, known in zip(c, there, strict=True)] for c in table["cells"]]
    return table


def rescue_over_time(metrics: Sequence[Mapping[str, Any]]) -> Table | None:
    """Share of rescued pivots by depth, from the metrics of every step; None for a run without pivots."""
    names = ("pivots/rescue_by_ratio", "pivots/ratio_histogram")
    having = [each for each in metrics if all(_is_histogram(each.get(name)) for name in names)]
    if not having:
        return None
    return columns(
        [each["step"] for each in having],
        [each["pivots/rescue_by_ratio"] for each in having],
        [each["pivots/ratio_histogram"] for each in having],
    )


def _is_histogram(value: Any) -> bool:
    return isinstance(value, list) and len(value) == DEPTH_BINS


def columns(
    steps: Sequence[int], values: Sequence[Sequence[float | None]], weights: Sequence[Sequence[float]], limit: int = COLUMNS
) -> Table:
    """A heat map over time with at most `limit` columns; neighbouring steps are merged by weighted means.

    Args:
        steps: `[S]` ascending.
        values: `[S, B]`; None: no value.
        weights: `[S, B]` weight of each value.

    Returns: `steps` `[C]` pairs (first, last), `cells` `[C, B]` means or None, `counts` `[C, B]` sums of the weights.
    """
    groups = np.array_split(np.arange(len(steps)), min(limit, len(steps)))
    cells: list[list[float | None]] = []
    counts: list[list[float]] = []
    for group in groups:
        means: list[float | None] = []
        totals: list[float] = []
        for row in range(len(values[0])):
            known = [(v, weights[i][row]) for i in group if (v := values[i][row]) is not None and (weights[i][row] or 0) > 0]
            total = sum(weight for _, weight in known)
            totals.append(total)
            means.append(round(sum(v * weight for v, weight in known) / total, 4) if total else None)
        cells.append(means)
        counts.append(totals)
    return {"steps": [[steps[g[0]], steps[g[-1]]] for g in groups], "cells": cells, "counts": counts}


def reliability(pivots: Sequence[PivotOutcome], metrics: Sequence[Mapping[str, Any]]) -> Table | None:
    """Predicted P(success | r) against the outcome, in ten bins of the prediction; None without a fit or pivots.

    Returns: `bins` with mean prediction, observed share, its 95% interval (pivots of a prompt are one cluster) and the
    number of pivots; `brier`, the mean squared error; `brier_constant`, that of always predicting the observed share;
    `error`, the mean distance of the bins from the diagonal, weighted by their pivots; `pivots`, the number of pivots.
    """
    fits = {
        each["step"] + 1: (each["recoverability/w"], each["recoverability/b"])
        for each in metrics
        if each.get("recoverability/fitted") and None not in (each.get("recoverability/w"), each.get("recoverability/b"))
    }
    known = [pivot for pivot in pivots if pivot.step in fits]
    if not known:
        return None
    slopes = np.array([fits[pivot.step] for pivot in known])
    ratios = np.array([pivot.ratio for pivot in known])
    predicted = np.exp(-np.logaddexp(0.0, -(slopes[:, 0] * ratios + slopes[:, 1])))
    outcome = np.array([float(pivot.success) for pivot in known])
    places = np.minimum(PREDICTION_BINS - 1, (predicted * PREDICTION_BINS).astype(int))
    bins, error = [], 0.0
    for place in range(PREDICTION_BINS):
        chosen = places == place
        if not chosen.any():
            continue
        clusters: dict[str, list[float]] = {}
        for i in np.flatnonzero(chosen):
            clusters.setdefault(known[i].prompt, []).append(outcome[i])
        share = clustered_proportion([sum(c) for c in clusters.values()], [len(c) for c in clusters.values()])
        mean = float(predicted[chosen].mean())
        error += share.trials * abs(mean - share.rate)
        bins.append(
            {"predicted": mean, "observed": share.rate, "low": share.low, "high": share.high, "pivots": share.trials}
        )
    base = float(outcome.mean())
    return {
        "bins": bins, "brier": float(np.mean((predicted - outcome) ** 2)), "brier_constant": base * (1 - base),
        "error": error / len(known), "pivots": len(known),
    }  # fmt: skip
