"""The tuning stage: figures of the trials, the choice of each arm, and their record. No torch.

    metrics.jsonl of every trial ─► one figure per trial and seed ─► highest mean ─► tune.json, tune.md

Untouched questions play no part in a choice. A recorded choice stands while grid, seeds, budget and rule are the same.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from deepgrpo.lab.compare.cells import markdown_table
from deepgrpo.lab.compare.curves import mean_height
from deepgrpo.lab.compare.experiment import TuneConfig
from deepgrpo.lab.compare.grid import Trial, Value, fixed_values, trials_of
from deepgrpo.lab.compare.plan import Plan, PlannedRun
from deepgrpo.lab.compare.run_figures import points
from deepgrpo.lab.compare.tune_tables import choice_lines, tuning_table
from deepgrpo.runs.files import replace_file
from deepgrpo.runs.metrics import read_metrics

_SETTINGS = ("seeds", "budget", "metric", "last_share")


def rule(tune: TuneConfig) -> str:
    """The rule of the choice as a sentence."""
    seeds = ", ".join(map(str, tune.seeds))
    return (
        f"Chosen is the trial with the highest {tune.metric} accuracy on the watched questions: mean height of its curve over "
        f"the last {tune.last_share:.0%} of {tune.budget:,} sampled tokens, averaged over seeds {seeds}. A tie goes to the "
        "lower value. A run whose loss was not finite counts with its last evaluation."
    )


def tuning(plan: Plan, diverged: Sequence[str] = ()) -> dict[str, Any]:
    """Figures of the trials and the choices as plain JSON.

    Args:
        diverged: names of runs whose loss was not finite; their last evaluation counts. Other runs short of the budget have no
            figure, and their arm no choice. For an arm whose recorded choice stands, the record is taken over.
    """
    tune = plan.experiment.tune
    assert tune is not None
    arms: dict[str, Any] = {}
    record = (read_tuning(plan) or {"arms": {}})["arms"]
    for arm, changes in plan.experiment.arms.items():
        if plan.trials_of(arm) and arm not in plan.undecided:
            arms[arm] = record[arm]
            continue
        tries = trials_of(tune.grid, changes)
        runs = {(run.trial.name, run.seed): run for run in plan.trials_of(arm) if run.trial}
        found = [_trial(trial, [runs[trial.name, s] for s in tune.seeds], tune, diverged) for trial in tries] if runs else []
        whole = all(each["whole"] for each in found)
        best = choose(found) if found and whole else None
        chosen = dict(tries[0].values) if len(tries) == 1 else best["values"] if best else None
        arms[arm] = {
            "fixed": fixed_values(tune.grid, changes),
            "trials": found,
            "chosen": chosen if tries else {},
            "edges": edges(tune.grid, chosen) if chosen and len(tries) > 1 else [],
        }
    return {"rule": rule(tune), **tune.model_dump(mode="json"), "arms": arms}


def _trial(trial: Trial, runs: Sequence[PlannedRun], tune: TuneConfig, diverged: Sequence[str]) -> dict[str, Any]:
    figures = {run.seed: trial_figure(run, tune, diverged=run.name in diverged) for run in runs}
    known = [figure for figure in figures.values() if figure is not None]
    return {
        "name": trial.name,
        "values": dict(trial.values),
        "mean": statistics.fmean(known) if len(known) == len(runs) else None,
        "seeds": {str(seed): figure for seed, figure in figures.items()},
        "diverged": [run.seed for run in runs if run.name in diverged],
        # nothing more will come: each run has its figure, or diverged before its first evaluation
        "whole": all(figures[run.seed] is not None or run.name in diverged for run in runs),
    }


def trial_figure(run: PlannedRun, tune: TuneConfig, *, diverged: bool) -> float | None:
    """Accuracy of a trial: mean height of its curve at the end of the budget, or its last evaluation if it diverged.

    None if it has not come so far, or diverged before its first evaluation.
    """
    try:
        lines = read_metrics(run.paths.metrics)
    except OSError:
        return None
    curve = points(lines, f"eval/{tune.metric}", "sampled_tokens")
    found = mean_height(curve, (1 - tune.last_share) * tune.budget, tune.budget)
    return curve[-1][1] if found is None and diverged and curve else found


def choose(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The trial with the highest mean; of equal ones, that with the lower learning rate, then the lower other values.

    None if no trial has a figure on every seed.
    """

    def order(trial: Mapping[str, Any]) -> tuple[Any, ...]:
        values = sorted(trial["values"].items(), key=lambda item: item[0] != "optim.lr")
        low = tuple(value if isinstance(value, int | float) else 0 for _, value in values)
        return (-round(trial["mean"], 9), *low)

    return min((trial for trial in trials if trial["mean"] is not None), key=order, default=None)


def edges(grid: Mapping[str, Sequence[Value]], chosen: Mapping[str, Value]) -> list[str]:
    """Keys whose chosen value is the lowest or the highest tried, so that a better one may lie outside. 0 is no edge."""
    found = []
    for key, value in chosen.items():
        tried = [each for each in grid[key] if isinstance(each, int | float) and not isinstance(each, bool)]
        if len(tried) > 1 and value != 0 and value in (min(tried), max(tried)):
            found.append(key)
    return found


# ---------------------------------------------------------------- the record


def read_choices(plan: Plan) -> dict[str, dict[str, Value]]:
    """Recorded choices by arm that still stand: same seeds, budget and rule, and the same trials of the arm."""
    tune, record = plan.experiment.tune, read_tuning(plan)
    if tune is None or record is None:
        return {}
    now = tune.model_dump(mode="json")
    if any(record.get(key) != now[key] for key in _SETTINGS):
        return {}
    stands: dict[str, dict[str, Value]] = {}
    for arm, changes in plan.experiment.arms.items():
        was = record["arms"].get(arm, {})
        tried = [each["values"] for each in was.get("trials", [])]
        if was.get("chosen") is not None and tried and tried == [dict(trial.values) for trial in trials_of(tune.grid, changes)]:
            stands[arm] = was["chosen"]
    return stands


def read_tuning(plan: Plan) -> dict[str, Any] | None:
    """The record of the tuning stage; None if there is none that can be read."""
    try:
        found: Any = json.loads(plan.paths.tuning.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("arms"), dict) else None


def write_tuning(plan: Plan, found: Mapping[str, Any]) -> None:
    """Write tune.json and tune.md."""
    replace_file(plan.paths.tuning, json.dumps(found, indent=1, allow_nan=False) + "\n")
    lines = [f"# {plan.experiment.name}: tuning", "", found["rule"], "", *(f"- {each}" for each in choice_lines(found)), ""]
    replace_file(plan.paths.tuning_page, "\n".join([*lines, *markdown_table(tuning_table(found))]) + "\n")
