"""Notes below the tables of a comparison: what a reader must know to read them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from deepgrpo.lab.compare.grid import label
from deepgrpo.lab.compare.plan import Plan, PlannedRun
from deepgrpo.runs.metrics import newest_metrics
from deepgrpo.stats import INTERVALS, sign_test


def notes(plan: Plan, finished: Sequence[PlannedRun], arms: Mapping[str, Any]) -> list[str]:
    """Notes on how to read the tables."""
    said: list[str] = []
    seeds, budget = len(plan.experiment.seeds), plan.experiment.budget
    missing = [run.name for run in plan.runs if run not in finished]
    if missing:
        said.append(f"not in these figures, as they are not finished: {', '.join(missing)}")
    said.append(
        f"± is the standard deviation over seeds. {INTERVALS} p is that of the exact two-sided sign test"
        + (f", which {seeds} seeds cannot bring below {sign_test(seeds, 0):.2g}." if seeds < 10 else ".")
    )
    if len(arms) > 2:
        said.append(f"{len(arms) - 1} arms are compared with the baseline: one interval that leaves out 0 may be chance.")
    said += [each for run in plan.warmstarts if (each := _poor_start(run))]
    if plan.experiment.tune is None and len(rates := {run.config.optim.lr for run in plan.runs}) == 1:
        said.append(
            f"The learning rate, {label(rates.pop())}, is shared by all arms and tuned for none: it may suit some better than "
            "others. A section [tune] gives each arm its own."
        )
    counts = {arm: statistics.fmean(f["watched/evaluations"] or 0.0 for f in each["runs"].values())
              for arm, each in arms.items() if each["runs"]}  # fmt: skip
    if max(counts.values()) > 1.2 * min(counts.values()):
        shown = ", ".join(f"{arm} {count:.0f}" for arm, count in counts.items())
        said.append(
            f"Evaluations per run differ ({shown}), so some curves are known more closely than others: eval.every_tokens "
            "evaluates all arms at the same marks."
        )
    over = {
        arm: max((f["spent/sampled_tokens"] for f in each["runs"].values()), default=0.0) / budget - 1
        for arm, each in arms.items()
    }
    if more := {arm: share for arm, share in over.items() if share > 0.02}:
        said.append(
            f"{', '.join(more)}: up to {max(more.values()):.0%} more sampled tokens than the budget, since a run stops between "
            "steps. Watched figures are read off the curve at the budget; those of untouched questions are of the last weights "
            "and include the surplus: take fewer prompts per step or a larger budget."
        )
    sampled_otherwise = sorted({str(run.arm) for run in plan.runs if _distribution(run) != _distribution(plan.runs[0])})
    if sampled_otherwise:
        said.append(
            f"{', '.join(sampled_otherwise)}: trained, and watched, from another distribution (temperature, top_p, ...) than "
            f"{plan.runs[0].arm}; the untouched questions are sampled alike for all."
        )
    scheduled = sorted({str(run.arm) for run in plan.runs if run.config.optim.schedule != "constant"})
    if scheduled:
        said.append(
            f"optim.schedule is not constant in {', '.join(scheduled)}: the learning rate falls towards run.steps, not towards "
            "the budget, so arms that stop earlier have seen less of the fall."
        )
    return said


def _poor_start(run: PlannedRun) -> str:
    """A sentence on a warm start that ended far below its target; empty if it did not."""
    target = run.config.warmstart.target_accuracy if run.config.warmstart else None
    reached = newest_metrics(run.paths.metrics).get("eval/sampled")
    if target is None or reached is None or reached > 0.5 * target:
        return ""
    return (
        f"{run.name} reached {reached:.1%} and aimed at warmstart.target_accuracy = {target}: where hardly any "
        "rollout succeeds no arm learns. Raise warmstart.steps, or leave that seed out."
    )


def _distribution(run: PlannedRun) -> tuple[float | None, ...]:
    sampling = run.config.sampling
    return sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.repetition_penalty
