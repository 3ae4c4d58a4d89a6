"""Figures of one run, from its metrics and its final evaluation. No torch."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from deepgrpo.errors import DataError
from deepgrpo.lab.compare.curves import Points, area, mean_height, value_at
from deepgrpo.lab.compare.plan import Plan, PlannedRun
from deepgrpo.runs.metrics import read_metrics
from deepgrpo.runs.saved import unreadable

Figures = dict[str, float | None]
"""Metric → value of one run; None for a target that was not reached or a metric that never occurred."""
Lines = Sequence[Mapping[str, Any]]
"""The lines of a metrics.jsonl."""

_END_SHARE = 0.1
"""Share of a run's last steps over which entropy and length "at the end" are averaged; a single step is noisy."""


def run_figures(plan: Plan, run: PlannedRun, lines: Lines, steps: float) -> Figures:
    """The figures of one run.

    Args:
        lines: its metrics.jsonl.
        steps: optimizer steps at which arms are compared, besides the budget.
    """
    budget = plan.experiment.budget
    late = (1.0 - plan.experiment.curve.last_share) * budget
    greedy, sampled = (points(lines, metric, "sampled_tokens") for metric in ("eval/greedy", "eval/sampled"))
    greedy_s, sampled_s = (points(lines, metric, "optimizer_steps") for metric in ("eval/greedy", "eval/sampled"))
    final = json.loads(run.paths.final.read_text(encoding="utf-8"))["metrics"]
    figures: Figures = {
        "start/greedy": greedy[0][1] if greedy else None,
        "start/sampled": sampled[0][1] if sampled else None,
        "final/greedy": final["eval/greedy"],
        "final/sampled": final["eval/sampled"],
        **{f"final/pass@{k}": final[f"eval/pass@{k}"] for k in plan.final.k},
        "final/pass": final[f"eval/pass@{max(plan.final.k)}"] if plan.final.k else None,
        "watched/greedy": value_at(greedy, budget),
        "watched/sampled": value_at(sampled, budget),
        "watched/late": mean_height(greedy, late, budget),
        "watched/area": area(greedy, budget),
        "watched/evaluations": float(len(greedy)),
        "steps/greedy": value_at(greedy_s, steps),
        "steps/sampled": value_at(sampled_s, steps),
        "steps/area": area(greedy_s, steps),
        "steps/sampled_tokens": _tokens_at(lines, steps),
    }
    return figures | spent_figures(lines) | training_figures(lines)


def spent_figures(lines: Lines) -> Figures:
    """Costs of a run, from the totals in its last line, and its passes over the data (None if it is endless)."""
    last = lines[-1]
    phases = ("seconds_sample", "seconds_tools", "seconds_signals", "seconds_reward", "seconds_learn")
    return {
        "spent/steps": float(last["step"]),
        **{
            f"spent/{name}": spent(last, name)
            for name in (
                "sampled_tokens", "sampled_sequences", "optimizer_steps", "trained_tokens", "learner_tokens",
                "prefix_tokens_encoded", "verifier_calls",
            )
        },
        # None without an environment
        "spent/given_tokens": _number(last, "ledger/given_tokens"),
        "spent/tool_calls": _number(last, "ledger/tool_calls"),
        "spent/tool_seconds": _number(last, "ledger/seconds_tools"),
        "spent/epochs": next((e for line in reversed(lines) if (e := _number(line, "data/epochs")) is not None), None),
        # evaluations and checkpoints are not costs of the method
        "spent/minutes": sum(spent(last, phase) for phase in phases) / 60.0,
    }  # fmt: skip


def training_figures(lines: Lines) -> Figures:
    """Training figures: gradient norm, entropy and length at the end, groups that carried signal."""
    steps = [line for line in lines if line["step"] > 0]
    end = steps[-max(1, math.ceil(_END_SHARE * len(steps))) :]
    groups = mixed = 0.0
    for line in steps:
        for stream in ("main", "branch"):
            count = _number(line, f"{stream}/groups") or 0.0
            groups += count
            mixed += count * (_number(line, f"{stream}/mixed") or 0.0)
    tokens = spent(lines[-1], "sampled_tokens")
    return {
        "train/grad_norm": _average(steps, "grad_norm"),
        "train/entropy": _average(end, "main/entropy"),
        "train/length": _average(end, "main/length"),
        "train/mixed": mixed / groups if groups else None,
        "train/mixed_per_1k": 1000.0 * mixed / tokens if groups and tokens else None,
    }


# ---------------------------------------------------------------- reading


def read_lines(run: PlannedRun) -> Lines:
    """The metrics of a finished run. Raises DataError if they are missing or have no totals."""
    path = run.paths.metrics
    try:
        found = read_metrics(path)
    except OSError as error:
        raise unreadable(path, error) from error
    if not found or not spent(found[-1], "sampled_tokens") or not points(found, "eval/greedy", "sampled_tokens"):
        raise DataError(
            f"{path} has no totals or no evaluation, although the run is finished; put the file back, or delete "
            f"{run.directory} to run it anew"
        )
    return found


def _number(line: Mapping[str, Any], metric: str) -> float | None:
    value = line.get(metric)
    return float(value) if isinstance(value, int | float) else None


def points(lines: Lines, metric: str, cost: str) -> Points:
    """(cost so far, value) of every evaluation."""
    return [(spent(line, cost), value) for line in lines if (value := _number(line, metric)) is not None]


def spent(line: Mapping[str, Any], name: str) -> float:
    """Total of a ledger field up to a step."""
    return _number(line, f"ledger/{name}") or 0.0


def _tokens_at(lines: Lines, steps: float) -> float:
    """Sampled tokens when optimizer step number `steps` was taken."""
    return next(spent(line, "sampled_tokens") for line in lines if spent(line, "optimizer_steps") >= steps)


def _average(lines: Lines, metric: str) -> float | None:
    values = [value for line in lines if (value := _number(line, metric)) is not None]
    return statistics.fmean(values) if values else None
