"""What saved pivots say: where Q put its mass, how often each depth was rescued, and whether P(success | r) was right.

    reliability   a pivot of step t is predicted by the fit behind step t - 1: it had not seen the pivot
    Q over depth  mean over the expanded rollouts of the mass of Q in each tenth of the depth ratio
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
"""Most columns of a picture over time; neighbouring steps are put together."""

Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Seen:
    """A pivot that was tried. Example: Seen(step=12, prompt="q7", ratio=0.6, success=True)."""

    step: int
    prompt: str
    ratio: float
    success: bool
    """At least one branch is a success: the label of the fit."""


def seen_pivots(tree: Tree, step: int, threshold: float) -> list[Seen]:
    """The pivots of a tree in the branch stream."""
    return [
        Seen(step, tree.prompt.id, pivot.ratio, succeeds(tree, index, threshold))
        for index, pivot in enumerate(tree.pivots)
        if pivot.stream == "branch" and pivot.ratio > 0
    ]


def candidate_ratios(pivot: Pivot) -> list[float]:
    """Depth ratios of a pivot's candidates. The pivot itself has one, which tells the length of the chain.

    `r = (place in the chain + 1) / length`; the root has place 0. Candidates (0, 10, 20, 30) with the pivot at 20 and
    r = .6 lie at .2, .4, .6, .8. Without the root, (10, 20, 30) lie at .4, .6, .8.
    """
    if pivot.offset not in pivot.candidates or pivot.ratio <= 0:
        return []
    first = 0 if pivot.candidates[0] == 0 else 1
    length = max(1, round((pivot.candidates.index(pivot.offset) + first + 1) / pivot.ratio))
    return [(place + first + 1) / length for place in range(len(pivot.candidates))]


def q_mass(trees: Iterable[Tree]) -> tuple[list[float], int]:
    """Mean mass of Q in each tenth of the depth, `[10]`, and the number of rollouts behind it.

    A rollout counts once however many pivots were drawn in it: they share one Q. The oracle, which has one candidate and no
    distribution, counts with that.
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
    """Q by depth, a column per saved step or per group of them; None if nothing was drawn from a Q."""
    steps = [step for step, (_, rollouts) in sorted(masses.items()) if rollouts]
    if not steps:
        return None
    table = columns(steps, [list(masses[s][0]) for s in steps], [[masses[s][1]] * DEPTH_BINS for s in steps])
    # a depth at which no state of the run lies is blank: not the same as states that are hardly ever drawn
    there = [any(masses[step][0][row] > 0 for step in steps) for row in range(DEPTH_BINS)]
    table["cells"] = [[mass if known else None for mass, known in zip(c, there, strict=True)] for c in table["cells"]]
    return table


def rescue_over_time(metrics: Sequence[Mapping[str, Any]]) -> Table | None:
    """Share of rescued pivots by depth, from the metrics of every step; None for a run without pivots."""
    having = [each for each in metrics if each.get("pivots/rescue_by_ratio") and each.get("pivots/ratio_histogram")]
    if not having:
        return None
    return columns(
        [each["step"] for each in having],
        [each["pivots/rescue_by_ratio"] for each in having],
        [each["pivots/ratio_histogram"] for each in having],
    )


def columns(
    steps: Sequence[int], values: Sequence[Sequence[float | None]], weights: Sequence[Sequence[float]], limit: int = COLUMNS
) -> Table:
    """A picture over time with at most `limit` columns, neighbours put together by weighted means.

    Args:
        steps: `[S]` ascending.
        values: `[S, B]`; None: nothing there.
        weights: `[S, B]` how much each value counts.

    Returns: `steps` `[C]` pairs (first, last), `cells` `[C, B]` means or None, `counts` `[C, B]` sums of the weights.
    """
    groups = np.array_split(np.arange(len(steps)), min(limit, len(steps)))
    cells: list[list[float | None]] = []
    counts: list[list[float]] = []
    for group in groups:
        means: list[float | None] = []
        totals: list[float] = []
        for row in range(len(values[0])):
            known = [(v, weights[i][row]) for i in group if (v := values[i][row]) is not None and weights[i][row] > 0]
            total = sum(weight for _, weight in known)
            totals.append(total)
            means.append(round(sum(v * weight for v, weight in known) / total, 4) if total else None)
        cells.append(means)
        counts.append(totals)
    return {"steps": [[steps[g[0]], steps[g[-1]]] for g in groups], "cells": cells, "counts": counts}


def reliability(pivots: Sequence[Seen], metrics: Sequence[Mapping[str, Any]]) -> Table | None:
    """Predicted P(success | r) against what happened, in ten bins of the prediction; None without a fit or pivots.

    Returns: `bins` with mean prediction, observed share, its 95% interval (pivots of a prompt are one cluster) and the
    number of pivots; `brier`, the mean squared error; `brier_constant`, that of always saying the observed share;
    `error`, the mean distance of the bins from the diagonal, weighted by their pivots; `pivots`, how many there are.
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
