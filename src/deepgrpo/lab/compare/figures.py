"""Figures of an experiment from its finished runs: by arm, and as paired differences. No torch.

    metrics.jsonl + final.json ─► run_figures ─► by arm ─► differences to the baseline, seed by seed ─► comparison.json

Arms are compared on two axes: at the same number of sampled tokens (the budget), and at the same number of optimizer steps
(the fewest of any run). A method that samples much per step looks better on the second, one that steps often on the first;
either alone would mislead. Both are read off the curve at that very mark, between the evaluations around it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from deepgrpo.lab.compare.curves import Points, common_windows, first_reached, thinned, value_at
from deepgrpo.lab.compare.notes import notes
from deepgrpo.lab.compare.plan import Plan, PlannedRun
from deepgrpo.lab.compare.run_figures import Figures, Lines, points, read_lines, run_figures, spent
from deepgrpo.lab.compare.tune_tables import choice_lines
from deepgrpo.stats import paired_interval

PAIRED = (
    "final/greedy", "final/sampled", "final/pass", "watched/greedy", "watched/sampled", "watched/late", "watched/area",
    "steps/greedy", "steps/sampled", "steps/area",
)  # fmt: skip
"""Accuracies whose differences to the baseline are reported; `final/pass` is pass@k at the largest k."""


def compare(plan: Plan, finished: Sequence[PlannedRun], tuned: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All figures of an experiment as plain JSON.

    Args:
        finished: runs that reached their budget and have a final evaluation; at least one.
        tuned: the record of the tuning stage (tune.py).

    Raises DataError if the metrics of a run are missing or have no totals.
    """
    lines = {run.name: read_lines(run) for run in finished}
    steps = min(spent(each[-1], "optimizer_steps") for each in lines.values())
    reached = tokens_to_target(plan, lines)
    arms: dict[str, Any] = {}
    for arm in plan.experiment.arms:
        mine = [run for run in finished if run.arm == arm]
        runs = {
            run.seed: {
                **run_figures(plan, run, lines[run.name], steps), "watched/tokens_to_target": reached[run.name]
            } for run in mine
        }  # fmt: skip
        arms[arm] = {
            "runs": {str(seed): figures for seed, figures in runs.items()},
            "mean": _by_metric(runs, statistics.fmean),
            "sd": _by_metric(runs, lambda values: statistics.stdev(values) if len(values) > 1 else 0.0),
            "tokens_to_target": _reached([figures["watched/tokens_to_target"] for figures in runs.values()]),
            "curve": {str(run.seed): _curve(lines[run.name]) for run in mine},
        }
    baseline = plan.experiment.baseline
    over_steps = {
        arm: {str(run.seed): points(lines[run.name], "eval/greedy", "optimizer_steps") for run in finished if run.arm == arm}
        for arm in arms
    }
    for arm in arms:
        if arm != baseline:
            arms[arm]["differences"] = {
                **differences(arms[arm]["runs"], arms[baseline]["runs"]),
                **difference_at_own_steps(over_steps[arm], over_steps[baseline]),
            }
    settings = plan.experiment.model_dump(mode="json")
    return {
        "name": plan.experiment.name, "experiment": settings, "final": plan.final.model_dump(mode="json"),
        "budget": plan.experiment.budget, "baseline": baseline, "optimizer_steps_compared": steps, "arms": arms,
        "tuning": tuned, "notes": notes(plan, finished, arms) + (choice_lines(tuned) if tuned else []),
    }  # fmt: skip


def differences(runs: Mapping[str, Figures], baseline: Mapping[str, Figures]) -> dict[str, Any]:
    """Arm minus baseline by metric, over the seeds of both: mean, interval, sign counts and individual values."""
    found: dict[str, Any] = {}
    for metric in PAIRED:
        values: dict[str, float] = {}
        for seed in runs:
            mine, other = runs[seed].get(metric), baseline.get(seed, {}).get(metric)
            if mine is not None and other is not None:
                values[seed] = mine - other
        if len(values) >= 2:
            found[metric] = {**asdict(paired_interval(list(values.values()))), "seeds": values}
    return found


def difference_at_own_steps(mine: Mapping[str, Points], baseline: Mapping[str, Points]) -> dict[str, Any]:
    """`pair/greedy`: arm minus baseline at the fewest optimizer steps of any run of these two arms.

    A third arm with few, large steps does not cut this comparison short.

    Args:
        mine, baseline: seed → greedy accuracy over optimizer steps.
    """
    both = [seed for seed in mine if seed in baseline]
    if len(both) < 2:
        return {}
    steps = min(curves[seed][-1][0] for curves in (mine, baseline) for seed in both)
    heights = {seed: (value_at(mine[seed], steps), value_at(baseline[seed], steps)) for seed in both}
    values = {seed: a - b for seed, (a, b) in heights.items() if a is not None and b is not None}
    level = statistics.fmean(a for a, _ in heights.values() if a is not None)
    interval = asdict(paired_interval(list(values.values())))
    return {"pair/greedy": {**interval, "seeds": values, "steps": steps, "level": level}}


def tokens_to_target(plan: Plan, lines: Mapping[str, Lines]) -> dict[str, float | None]:
    """Run → sampled tokens at which it has reached `curve.target`; None if it has not within the budget, or without a target.

    All runs are judged at the same number of marks: a run that is evaluated more often has no more chances to be lucky.
    """
    target, budget = plan.experiment.curve.target, plan.experiment.budget
    if target is None:
        return dict.fromkeys(lines)
    curves = {name: points(each, "eval/greedy", "sampled_tokens") for name, each in lines.items()}
    windows = common_windows(list(curves.values()), budget)
    found = {name: first_reached(thinned(curve, windows, budget), target) for name, curve in curves.items()}
    return {name: None if x is None or x > budget else x for name, x in found.items()}


def figure_rows(result: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of the tables in rows: one per arm and metric, with its difference to the baseline where it has one.

    Example of a row: {"arm": "deep", "metric": "final/greedy", "seeds": 8, "mean": 0.71, "sd": 0.02, "difference": 0.03,
    "low": 0.01, "high": 0.05, "pairs": 8, "above": 7, "below": 1, "sign_p": 0.07}.
    """
    rows: list[dict[str, Any]] = []
    for arm, each in result["arms"].items():
        for metric, mean in each["mean"].items():
            row = {"arm": arm, "metric": metric, "seeds": len(each["runs"]), "mean": mean, "sd": each["sd"][metric]}
            if (paired := each.get("differences", {}).get(metric)) is not None:
                row |= _paired_row(paired)
            rows.append(row)
        if (paired := each.get("differences", {}).get("pair/greedy")) is not None:
            row = {"arm": arm, "metric": "pair/greedy", "seeds": paired["n"], "mean": paired["level"], "steps": paired["steps"]}
            rows.append(row | _paired_row(paired))
    tuned = result["tuning"]
    return {
        "name": result["name"], "baseline": result["baseline"], "budget": result["budget"],
        "optimizer_steps": result["optimizer_steps_compared"], "seeds": result["experiment"]["seeds"],
        "chosen": {arm: {**each["fixed"], **(each["chosen"] or {})} for arm, each in tuned["arms"].items()} if tuned else {},
        "edges": {arm: each["edges"] for arm, each in tuned["arms"].items()} if tuned else {},
        "tokens_to_target": {arm: each["tokens_to_target"] for arm, each in result["arms"].items()},
        "rows": rows,
    }  # fmt: skip


# ---------------------------------------------------------------- parts


def _paired_row(paired: Mapping[str, Any]) -> dict[str, Any]:
    same = {key: paired[key] for key in ("low", "high", "above", "below", "sign_p")}
    return {"difference": paired["mean"], "pairs": paired["n"], **same}


def _curve(lines: Lines) -> list[dict[str, float]]:
    """Every evaluation with the costs so far: enough to redraw the figure."""
    return [
        {
            "sampled_tokens": spent(line, "sampled_tokens"), "optimizer_steps": spent(line, "optimizer_steps"),
            "greedy": greedy, **({"sampled": line["eval/sampled"]} if "eval/sampled" in line else {}),
        }
        for line in lines if (greedy := line.get("eval/greedy")) is not None
    ]  # fmt: skip


def _by_metric(runs: Mapping[int, Figures], combine: Any) -> Figures:
    """One value per metric; None if any run lacks it, since a mean over the remaining seeds would be biased."""
    names = list(next(iter(runs.values()), {}))
    combined: Figures = {}
    for name in names:
        values = [figures[name] for figures in runs.values()]
        combined[name] = None if any(value is None for value in values) else float(combine(values))
    return combined


def _reached(values: Sequence[float | None]) -> dict[str, Any]:
    """Number of runs that reached the target, and the median over all runs, counting the others as beyond the budget."""
    reached = sum(value is not None for value in values)
    ordered = sorted(math.inf if value is None else value for value in values)
    median = statistics.median(ordered) if ordered else math.inf
    return {"reached": reached, "runs": len(values), "median": median if math.isfinite(median) else None}
