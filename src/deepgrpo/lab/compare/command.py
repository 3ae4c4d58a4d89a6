"""`deepgrpo compare`: train every arm of an experiment on every seed to the same budget, and compare the results.

    experiment.toml ─► Plan ─► jobs: warm start ─► train ─► final evaluation ─► comparison.json, .md, .png
                                      (per seed)   (per seed and arm)

All results are in the experiment's directory; finished work there is not repeated:

    experiment.toml   copy of the experiment file       warmstart/seed-1/      a run without steps; its start/ is shared
    jobs/             recipe and output of every job    arms/deep/seed-1/      an ordinary run, with final.json
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from deepgrpo.config import Config, load_recipe, to_toml
from deepgrpo.errors import ConfigError
from deepgrpo.eval.output import print_whole
from deepgrpo.lab.compare.experiment import find_experiment, load_experiment
from deepgrpo.lab.compare.figures import compare
from deepgrpo.lab.compare.final_eval import refuse_too_few
from deepgrpo.lab.compare.jobs import Job, Jobs, last_line
from deepgrpo.lab.compare.plan import Plan, PlannedRun, expand
from deepgrpo.lab.compare.plot import can_draw, draw
from deepgrpo.lab.compare.progress import has_budget, is_finished, progress
from deepgrpo.lab.compare.tables import as_markdown, as_table, comparison_tables
from deepgrpo.lab.compare.watch import Watch
from deepgrpo.lab.options import CompareOptions
from deepgrpo.runs.files import delete_tree
from deepgrpo.terminal import Terminal


def run_compare(options: CompareOptions, console: Console | None = None) -> int:
    """Run the command. Returns 0, or 1 if a run failed or ended short of its budget; the figures then cover the others.

    Raises ConfigError for an impossible experiment, KeyboardInterrupt after Ctrl-C.
    """
    out = console or Terminal()
    if options.jobs < 1:
        raise ConfigError(f"--jobs is {options.jobs}, but at least one job has to run; set it to 1 or more")
    source = find_experiment(options.experiment)
    experiment = load_experiment(source)
    if options.dir is not None:
        experiment = experiment.model_copy(update={"dir": options.dir})
    plan = expand(experiment, source)
    refuse_unreachable(plan)
    refuse_too_few(plan.runs[0].config, plan.final)
    if options.dry_run:
        from deepgrpo.lab.compare.forecast import forecast

        forecast(plan, options.jobs, out)
        return 0
    with _locked(plan.directory) as lock:
        refuse_changed(plan)
        _write(plan)
        jobs = Jobs(make_jobs(plan), workers=options.jobs, keep_open=[lock] if lock is not None else [])
        _run(plan, jobs, out)
        finished = [run for run in plan.runs if is_finished(plan, run)]
        for sentence in failures(plan, jobs):
            out.print(f"warning: {sentence}", style="yellow", markup=False, soft_wrap=True)
        if finished:
            _report(plan, finished, options.jobs, out)
    return 0 if len(finished) == len(plan.runs) else 1


# ---------------------------------------------------------------- the jobs


def make_jobs(plan: Plan) -> list[Job]:
    """Warm start, training and final evaluation of every seed and arm; a directory without a checkpoint starts over."""
    jobs: list[Job] = []
    folder = plan.directory / "jobs"
    for seed in plan.experiment.seeds:
        before: tuple[str, ...] = ()
        for warm in plan.warmstarts:
            # not needed once every arm of the seed has a checkpoint
            if warm.seed == seed and not all(_is_kept(run) for run in plan.runs if run.seed == seed):
                jobs.append(_train(warm, folder, warm.paths.start.is_dir, ()))
                before = (warm.name,)
        for run in plan.runs:
            if run.seed != seed:
                continue
            jobs.append(_train(run, folder, functools.partial(has_budget, run), before))
            jobs.append(
                Job(
                    f"{run.name}-final",
                    ("deepgrpo.lab.compare.final_eval", str(run.directory), str(folder / "final-setup.json")),
                    folder / f"{run.name}-final.log",
                    functools.partial(is_finished, plan, run),
                    after=(run.name,),
                )
            )
    return jobs


def _train(run: PlannedRun, folder: Path, finished: Callable[[], bool], after: tuple[str, ...]) -> Job:
    command: tuple[str, ...] = ("deepgrpo.cli", "train", str(folder / f"{run.name}.toml"))
    if run.arm is not None and progress(run).step:
        wanted = run.config.run
        command = (
            "deepgrpo.cli", "train", "--resume", str(run.directory), "--run.steps", str(wanted.steps),
            "--run.max_sampled_tokens", str(wanted.max_sampled_tokens),
        )  # fmt: skip
    return Job(run.name, command, folder / f"{run.name}.log", finished, after)


def failures(plan: Plan, jobs: Jobs) -> list[str]:
    """One sentence for each job that failed or was skipped."""
    said = []
    runs = {run.name: run for run in (*plan.warmstarts, *plan.runs)}
    for job in jobs.jobs:
        if jobs.state[job.name] != "failed":
            continue
        run = runs.get(job.name)
        at = progress(run) if run is not None and run.arm is not None else None
        if run is not None and at is not None and at.over:
            needed = -(-at.step * plan.experiment.budget // max(1, at.tokens))
            said.append(
                f"{job.name} ended at {at.tokens:,} of {plan.experiment.budget:,} sampled tokens, as its run.steps = "
                f"{run.config.run.steps} steps were over; about {needed} are needed: raise run.steps (of the arm, or in "
                "[common]) and repeat the command, which continues the run"
            )
        else:
            said.append(f"{job.name} failed: {last_line(job.log) or 'no output'} (full output: {job.log})")
    if skipped := [name for name, state in jobs.state.items() if state == "skipped"]:
        said.append(f"not run for that reason: {', '.join(skipped)}")
    return said


# ---------------------------------------------------------------- what is refused


def refuse_unreachable(plan: Plan) -> None:
    """Raise ConfigError if an arm cannot sample its budget within run.steps even with responses of maximum length."""
    from deepgrpo.train.dry_run import estimate_tokens

    for run in plan.runs:
        config = run.config
        most = estimate_tokens(config).total * (config.sampling.max_rounds if config.sampling.dynamic else 1)
        if most * config.run.steps < plan.experiment.budget:
            raise ConfigError(
                f"the arm {run.arm!r} cannot reach the budget of {plan.experiment.budget:,} sampled tokens: its run.steps = "
                f"{config.run.steps} steps sample at most {most:,} each; set common.run.steps to at least "
                f"{-(-plan.experiment.budget // most)} (and well above: most responses are shorter than the limit), or lower "
                "the budget"
            )


def refuse_changed(plan: Plan) -> None:
    """Raise ConfigError if a run in the directory was made with a different recipe from the one now planned.

    A longer run or a larger budget counts as the same recipe if the learning rate does not depend on it.
    """
    for run in (*plan.warmstarts, *plan.runs):
        path = run.paths.config
        if not path.is_file() or not _is_kept(run):
            continue
        before = load_recipe(path)
        longer = run.config.optim.schedule == "constant" and _length(before) <= _length(run.config)
        then, now = (_flat(_freed(config) if longer else config) for config in (before, run.config))
        if changed := [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]:
            key = changed[0]
            raise ConfigError(
                f"{run.directory} was run with {key} = {then.get(key)!r}, and the experiment now says {now.get(key)!r}"
                + (f" (and {len(changed) - 1} more keys differ)" if len(changed) > 1 else "")
                + "; runs of two recipes cannot be compared as one arm: delete that directory to run it anew, or give the "
                "experiment another name"
            )


def _is_kept(run: PlannedRun) -> bool:
    """True if the run's directory holds work to continue from."""
    return run.paths.start.is_dir() if run.arm is None else progress(run).step > 0


def _length(config: Config) -> tuple[int, int]:
    return config.run.max_sampled_tokens or 0, config.run.steps


def _freed(config: Config) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"steps": 0, "max_sampled_tokens": None})})


def _flat(config: Config) -> dict[str, Any]:
    def walk(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in table.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    # neither the location of a run nor the threads that it has found is part of its recipe
    own = ("run.dir", "run.name", "run.threads", "warmstart.from")
    return {key: value for key, value in walk(config.model_dump(mode="json"), "") if key not in own}


@contextmanager
def _locked(directory: Path) -> Iterator[int | None]:
    """Hold the experiment's lock. Jobs inherit it, so it is released only when the last of them has ended.

    Yields the file descriptor of the lock, or None on systems without such locks. Raises ConfigError if the lock is taken.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be created: {error}; choose another directory with --dir") from error
    try:
        import fcntl
    except ImportError:
        yield None
        return
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{directory} is in use by another `deepgrpo compare`, or by a run it left behind; wait for it, or "
                "end it (`ps` shows it as deepgrpo.cli train)"
            ) from None
        yield file.fileno()


# ---------------------------------------------------------------- running and reporting


def _write(plan: Plan) -> None:
    """Write the recipes of the jobs; delete remains of runs without a checkpoint."""
    folder = plan.directory / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    text = plan.source.read_bytes()
    (plan.directory / "experiment.toml").write_bytes(text)  # the source may be this same file
    (folder / "final-setup.json").write_text(json.dumps(plan.final.model_dump(mode="json")), encoding="utf-8")
    for run in (*plan.warmstarts, *plan.runs):
        (folder / f"{run.name}.toml").write_text(to_toml(run.config), encoding="utf-8")
        if run.directory.is_dir() and not _is_kept(run):
            delete_tree(run.directory)


def _run(plan: Plan, jobs: Jobs, out: Console) -> None:
    budget, seeds = plan.experiment.budget, len(plan.experiment.seeds)
    done = sum(progress(run).done for run in plan.runs)
    out.print(
        f"{plan.experiment.name}: {len(plan.experiment.arms)} arms × {seeds} seeds, {budget:,} sampled tokens each"
        + (f"; {done} of {len(plan.runs)} runs are finished already" if done else ""),
        markup=False, soft_wrap=True,
    )  # fmt: skip
    try:
        with Watch(plan, jobs, out) as watch:
            jobs.run(watch.changed, watch.tick)
    except KeyboardInterrupt:
        left = sum(not progress(run).done for run in plan.runs)
        out.print(
            f"stopped; {len(plan.runs) - left} of {len(plan.runs)} runs are finished, the others were saved; continue "
            "with the same command",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        raise


def _report(plan: Plan, finished: list[PlannedRun], jobs: int, out: Console) -> None:
    from deepgrpo.lab.machine import machine_and_versions

    result = {**compare(plan, finished), "jobs": jobs, **machine_and_versions()}
    folder = plan.directory
    (folder / "comparison.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text(as_markdown(result), encoding="utf-8")
    for table in comparison_tables(result):
        print_whole(out, as_table(table))
    for note in result["notes"]:
        out.print(f"· {note}", markup=False, soft_wrap=True)
    files = ["comparison.json", "comparison.md"]
    if can_draw():
        draw(result, folder / "comparison.png")
        files.append("comparison.png")
    else:
        out.print('no figure: matplotlib is not installed (pip install "deepgrpo[plots]")', markup=False, soft_wrap=True)
    out.print(f"{folder}: {', '.join(files)}", markup=False, soft_wrap=True)
