"""Figures of an experiment from its finished runs: per run, per arm, and as paired differences. No torch.

    metrics.jsonl + final.json ─► run_figures ─► by arm ─► differences to the baseline, seed by seed ─► comparison.json

Arms are compared on two axes: at the same number of sampled tokens (the budget), and at the same number of optimizer steps
(the fewest of any run). A method that samples much per step looks better on the second, one that steps often on the first;
either alone would mislead.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from deepgrpo.errors import DataError
from deepgrpo.lab.compare.curves import Points, TailMean, area, first_crossing, tail_mean
from deepgrpo.lab.compare.plan import Plan, PlannedRun
from deepgrpo.lab.compare.tune_tables import choice_lines
from deepgrpo.runs.files import remedy
from deepgrpo.runs.metrics import read_metrics
from deepgrpo.stats import bootstrap_interval

Figures = dict[str, float | None]
"""Metric → value of one run; None for a target that was not reached or a metric that never occurred."""

PAIRED = (
    "final/greedy", "final/sampled", "final/pass", "watched/greedy", "watched/sampled", "watched/area", "steps/greedy",
    "steps/sampled", "steps/area",
)  # fmt: skip
"""Accuracies whose differences to the baseline are reported; `final/pass` is pass@k at the largest k."""

_END_SHARE = 0.1
"""Share of a run's last steps over which entropy and length "at the end" are averaged; a single step is noisy."""


def compare(plan: Plan, finished: Sequence[PlannedRun], tuned: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All figures of an experiment as plain JSON.

    Args:
        finished: runs that reached their budget and have a final evaluation; at least one.
        tuned: the record of the tuning stage (tune.py).

    Raises DataError if the metrics of a run are missing or have no totals.
    """
    lines = {run.name: _lines(run) for run in finished}
    steps = min(spent(each[-1], "optimizer_steps") for each in lines.values())
    arms: dict[str, Any] = {}
    for arm in plan.experiment.arms:
        mine = [run for run in finished if run.arm == arm]
        runs = {run.seed: run_figures(plan, run, lines[run.name], steps) for run in mine}
        arms[arm] = {
            "runs": {str(seed): figures for seed, figures in runs.items()},
            "mean": _by_metric(runs, statistics.fmean),
            "sd": _by_metric(runs, lambda values: statistics.stdev(values) if len(values) > 1 else 0.0),
            "tokens_to_target": _reached([figures["watched/tokens_to_target"] for figures in runs.values()]),
            "curve": {str(run.seed): _curve(lines[run.name]) for run in mine},
        }
    baseline = plan.experiment.baseline
    for arm in arms:
        if arm != baseline:
            arms[arm]["differences"] = differences(arms[arm]["runs"], arms[baseline]["runs"])
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
            found[metric] = {**asdict(bootstrap_interval(list(values.values()))), "seeds": values}
    return found


def run_figures(plan: Plan, run: PlannedRun, lines: Sequence[Mapping[str, Any]], steps: float) -> Figures:
    """The figures of one run.

    Args:
        lines: its metrics.jsonl.
        steps: optimizer steps at which arms are compared, besides the budget.
    """
    budget, (last, share) = plan.experiment.budget, plan.experiment.curve.window
    greedy, sampled = (points(lines, metric, "sampled_tokens") for metric in ("eval/greedy", "eval/sampled"))
    greedy_s, sampled_s = (points(lines, metric, "optimizer_steps") for metric in ("eval/greedy", "eval/sampled"))
    within_s = [p for p in greedy_s if p[0] <= steps]
    whole = tail_mean(greedy, last=last, share=share, end=budget)
    final = json.loads(run.paths.final.read_text(encoding="utf-8"))["metrics"]
    target = plan.experiment.curve.target
    figures: Figures = {
        "start/greedy": greedy[0][1] if greedy else None,
        "start/sampled": sampled[0][1] if sampled else None,
        "final/greedy": final["eval/greedy"],
        "final/sampled": final["eval/sampled"],
        **{f"final/pass@{k}": final[f"eval/pass@{k}"] for k in plan.final.k},
        "final/pass": final[f"eval/pass@{max(plan.final.k)}"] if plan.final.k else None,
        "watched/greedy": _mean(whole),
        "watched/sampled": _mean(tail_mean(sampled, last=last, share=share, end=budget)),
        "watched/evaluations": float(whole.count) if whole else 0.0,
        "watched/area": area(greedy, budget),
        "watched/tokens_to_target": None if target is None else first_crossing(greedy, target),
        "steps/greedy": _mean(tail_mean(within_s, last=last, share=share, end=steps)),
        "steps/sampled": _mean(tail_mean([p for p in sampled_s if p[0] <= steps], last=last, share=share, end=steps)),
        "steps/area": area(greedy_s, steps),
        "steps/sampled_tokens": _tokens_at(lines, steps),
    }
    return figures | spent_figures(lines[-1]) | training_figures(lines)


def spent_figures(last: Mapping[str, Any]) -> Figures:
    """Costs of a run, from the totals in its last line."""
    phases = ("seconds_sample", "seconds_signals", "seconds_reward", "seconds_learn")
    return {
        "spent/steps": float(last["step"]),
        **{
            f"spent/{name}": spent(last, name)
            for name in (
                "sampled_tokens", "sampled_sequences", "optimizer_steps", "trained_tokens", "learner_tokens",
                "prefix_tokens_encoded", "verifier_calls",
            )
        },
        # evaluations and checkpoints are not costs of the method
        "spent/minutes": sum(spent(last, phase) for phase in phases) / 60.0,
    }  # fmt: skip


def training_figures(lines: Sequence[Mapping[str, Any]]) -> Figures:
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


def notes(plan: Plan, finished: Sequence[PlannedRun], arms: Mapping[str, Any]) -> list[str]:
    """Notes on how to read the tables."""
    said: list[str] = []
    seeds, budget = len(plan.experiment.seeds), plan.experiment.budget
    missing = [run.name for run in plan.runs if run not in finished]
    if missing:
        said.append(f"not in these figures, as they are not finished: {', '.join(missing)}")
    least = 2 / 2**seeds
    said.append(
        f"± is the standard deviation over seeds. Intervals are 95% percentile bootstraps over {seeds} paired seeds, on these "
        "questions."
        + (
            f" With so few seeds they are coarse and too narrow (5 seeds cover the truth in about 84 of 100 cases, not 95); "
            f"the sign test cannot fall below p = {least:.2g} either."
            if seeds < 10
            else ""
        )
    )
    if len(arms) > 2:
        said.append(f"{len(arms) - 1} arms are compared with the baseline: one interval that leaves out 0 may be chance.")
    last, share = plan.experiment.curve.window
    wanted = f"the last {last} evaluations" if last else f"the evaluations in the last {share:.0%}"
    counts = {arm: sorted({f["watched/evaluations"] for f in each["runs"].values()}) for arm, each in arms.items()}
    if last and any(count < last for each in counts.values() for count in each):
        fewest = min(count for each in counts.values() for count in each)
        said.append(f"Watched figures are means over {wanted}, of which there are only {fewest:.0f} in some runs.")
    over = {
        arm: max((f["spent/sampled_tokens"] for f in each["runs"].values()), default=0.0) / budget - 1
        for arm, each in arms.items()
    }
    for arm, share_over in over.items():
        if share_over > 0.05:
            said.append(
                f"{arm} samples up to {share_over:.0%} more than the budget, since a run stops between steps and its steps are "
                "large: take fewer prompts per step or a larger budget."
            )
    sampled_otherwise = sorted({str(run.arm) for run in plan.runs if _distribution(run) != _distribution(plan.runs[0])})
    if sampled_otherwise:
        said.append(
            f"{', '.join(sampled_otherwise)}: trained, and watched, at another temperature or top_p than "
            f"{plan.runs[0].arm}; the untouched questions are sampled alike for all."
        )
    scheduled = sorted({str(run.arm) for run in plan.runs if run.config.optim.schedule != "constant"})
    if scheduled:
        said.append(
            f"optim.schedule is not constant in {', '.join(scheduled)}: the learning rate falls towards run.steps, not towards "
            "the budget, so arms that stop earlier have seen less of the fall."
        )
    return said


def _distribution(run: PlannedRun) -> tuple[float, float]:
    return run.config.sampling.temperature, run.config.sampling.top_p


# ---------------------------------------------------------------- reading


def _lines(run: PlannedRun) -> Sequence[Mapping[str, Any]]:
    path = run.paths.metrics
    try:
        found = read_metrics(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; {remedy(error)}") from error
    if not found or not spent(found[-1], "sampled_tokens") or not points(found, "eval/greedy", "sampled_tokens"):
        raise DataError(
            f"{path} has no totals or no evaluation, although the run is finished; put the file back, or delete "
            f"{run.directory} to run it anew"
        )
    return found


def _number(line: Mapping[str, Any], metric: str) -> float | None:
    value = line.get(metric)
    return float(value) if isinstance(value, int | float) else None


def points(lines: Sequence[Mapping[str, Any]], metric: str, cost: str) -> Points:
    """(cost so far, value) of every evaluation."""
    return [(spent(line, cost), value) for line in lines if (value := _number(line, metric)) is not None]


def spent(line: Mapping[str, Any], name: str) -> float:
    """Total of a ledger field up to a step."""
    return _number(line, f"ledger/{name}") or 0.0


def _tokens_at(lines: Sequence[Mapping[str, Any]], steps: float) -> float:
    """Sampled tokens when optimizer step number `steps` was taken."""
    return next(spent(line, "sampled_tokens") for line in lines if spent(line, "optimizer_steps") >= steps)


def _curve(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Every evaluation with the costs so far: enough to redraw the figure."""
    return [
        {
            "sampled_tokens": spent(line, "sampled_tokens"), "optimizer_steps": spent(line, "optimizer_steps"),
            "greedy": greedy, **({"sampled": line["eval/sampled"]} if "eval/sampled" in line else {}),
        }
        for line in lines if (greedy := _number(line, "eval/greedy")) is not None
    ]  # fmt: skip


def _mean(found: TailMean | None) -> float | None:
    return None if found is None else found.mean


def _average(lines: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    values = [value for line in lines if (value := _number(line, metric)) is not None]
    return statistics.fmean(values) if values else None


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
