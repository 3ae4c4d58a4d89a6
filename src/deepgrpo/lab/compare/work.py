"""Jobs of an experiment: warm starts, then the runs of a stage, each with its final evaluation if it is a fresh one."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence

from deepgrpo.config import to_toml
from deepgrpo.lab.compare.jobs import Job, Jobs, last_line
from deepgrpo.lab.compare.plan import Plan, PlannedRun
from deepgrpo.lab.compare.progress import has_budget, is_finished, is_kept, progress
from deepgrpo.runs.files import delete_tree


def make_jobs(plan: Plan, runs: Sequence[PlannedRun]) -> list[Job]:
    """Jobs of some runs, seed by seed; a directory without a checkpoint starts over."""
    jobs: list[Job] = []
    for seed in dict.fromkeys(run.seed for run in runs):
        before: tuple[str, ...] = ()
        warm = plan.warmstart_of(seed)
        # not needed once every run of the seed has a checkpoint
        if warm is not None and not all(is_kept(run) for run in runs if run.seed == seed):
            before = (warm.name,)
            if warm.name not in {job.name for job in jobs}:
                jobs.append(_train(plan, warm, warm.paths.start.is_dir, ()))
        for run in runs:
            if run.seed != seed:
                continue
            jobs.append(_train(plan, run, functools.partial(has_budget, run), before))
            if run.trial is None:
                jobs.append(
                    Job(
                        f"{run.name}-final",
                        ("deepgrpo.lab.compare.final_eval", str(run.directory), str(plan.paths.final_setup)),
                        plan.paths.job_log(f"{run.name}-final"),
                        functools.partial(is_finished, plan, run),
                        after=(run.name,),
                    )
                )
    return jobs


def _train(plan: Plan, run: PlannedRun, finished: Callable[[], bool], after: tuple[str, ...]) -> Job:
    command: tuple[str, ...] = ("deepgrpo.cli", "train", str(plan.paths.recipe(run.name)))
    if run.arm is not None and progress(run).step:
        wanted = run.config.run
        command = (
            "deepgrpo.cli", "train", "--resume", str(run.directory), "--run.steps", str(wanted.steps),
            "--run.max_sampled_tokens", str(wanted.max_sampled_tokens),
        )  # fmt: skip
    return Job(run.name, command, plan.paths.job_log(run.name), finished, after)


def write_recipes(plan: Plan, runs: Sequence[PlannedRun]) -> None:
    """Write the recipes of the jobs; delete remains of runs without a checkpoint."""
    folder = plan.paths.jobs
    folder.mkdir(parents=True, exist_ok=True)
    text = plan.source.read_bytes()
    plan.paths.experiment.write_bytes(text)  # the source may be this same file
    plan.paths.final_setup.write_text(json.dumps(plan.final.model_dump(mode="json")), encoding="utf-8")
    for run in (*plan.warmstarts, *runs):
        plan.paths.recipe(run.name).write_text(to_toml(run.config), encoding="utf-8")
        if run.directory.is_dir() and not is_kept(run):
            delete_tree(run.directory)


def failures(plan: Plan, jobs: Jobs) -> list[str]:
    """One sentence for each job that failed or was skipped."""
    said = []
    runs = {run.name: run for run in (*plan.warmstarts, *plan.trials, *plan.runs)}
    for job in jobs.jobs:
        if jobs.state[job.name] != "failed":
            continue
        run = runs.get(job.name)
        at = progress(run) if run is not None and run.arm is not None else None
        if run is not None and at is not None and at.over:
            needed = -(-at.step * run.budget // max(1, at.tokens))
            said.append(
                f"{job.name} ended at {at.tokens:,} of {run.budget:,} sampled tokens, as its run.steps = "
                f"{run.config.run.steps} steps were over; about {needed} are needed: raise run.steps (of the arm, or in "
                "[common]) and repeat the command, which continues the run"
            )
        else:
            said.append(f"{job.name} failed: {last_line(job.log) or 'no output'} (full output: {job.log})")
    if skipped := [name for name, state in jobs.state.items() if state == "skipped"]:
        said.append(f"not run for that reason: {', '.join(skipped)}")
    return said
