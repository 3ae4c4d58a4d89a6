"""`deepgrpo compare`: train every arm of an experiment on every seed to the same budget, and compare the results.

    experiment.toml ─► Plan ─► tuning: trials of every arm ─► tune.json ─► the choice of each arm
                                                                                │
                               fresh runs ─► final evaluations ─► comparison.json, .md, .png

The tuning stage is left out without a section [tune]. All results are in the experiment's directory (layout.py); finished
work there is not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from deepgrpo.errors import ConfigError, DivergenceError
from deepgrpo.lab.compare.cells import print_comparison
from deepgrpo.lab.compare.experiment import find_experiment, load_experiment
from deepgrpo.lab.compare.figures import compare, figure_rows
from deepgrpo.lab.compare.final_eval import refuse_too_few
from deepgrpo.lab.compare.jobs import Jobs
from deepgrpo.lab.compare.layout import ExperimentDir
from deepgrpo.lab.compare.plan import Plan, PlannedRun, expand
from deepgrpo.lab.compare.plot import can_draw, draw
from deepgrpo.lab.compare.progress import is_finished, progress
from deepgrpo.lab.compare.refusals import refuse_changed, refuse_unreachable
from deepgrpo.lab.compare.tables import as_markdown, comparison_tables
from deepgrpo.lab.compare.tune import read_choices, read_tuning, tuning, write_tuning
from deepgrpo.lab.compare.tune_tables import choice_lines, tuning_table
from deepgrpo.lab.compare.watch import Watch
from deepgrpo.lab.compare.work import failures, make_jobs, write_recipes
from deepgrpo.lab.options import CompareOptions
from deepgrpo.terminal import Terminal


def run_compare(options: CompareOptions) -> int:
    """Run the command. Returns 0, or 1 if a run failed or ended short of its budget; the figures then cover the others.

    Raises ConfigError for an impossible experiment, KeyboardInterrupt after Ctrl-C.
    """
    out = Terminal()
    if options.jobs < 1:
        raise ConfigError(f"--jobs is {options.jobs}, but at least one job has to run; set it to 1 or more")
    plan = _planned(options)
    refuse_unreachable(plan)
    refuse_too_few(plan.runs[0].config, plan.final)
    if options.dry_run:
        from deepgrpo.lab.compare.forecast import forecast

        forecast(plan, options.jobs, out)
        return 0
    if options.figures:
        _show(plan, out)
        return 0
    with _locked(plan.paths) as lock:
        keep_open = [lock] if lock is not None else []
        refuse_changed((*plan.warmstarts, *plan.trials, *plan.decided))
        if plan.undecided:
            plan = _tune(plan, options.jobs, keep_open, out)
            refuse_changed(plan.decided)
        _run(plan, plan.decided, options.jobs, keep_open, out)
        finished = [run for run in plan.decided if is_finished(plan, run)]
        if finished:
            _report(plan, finished, options.jobs, out)
    return 0 if len(finished) == len(plan.runs) else 1


def _planned(options: CompareOptions) -> Plan:
    """The experiment with the choices recorded so far."""
    source = find_experiment(options.experiment)
    experiment = load_experiment(source)
    if options.dir is not None:
        experiment = experiment.model_copy(update={"dir": options.dir})
    plan = expand(experiment, source)
    choices = read_choices(plan)
    return expand(experiment, source, choices) if choices else plan


@contextmanager
def _locked(paths: ExperimentDir) -> Iterator[int | None]:
    """Hold the experiment's lock. Jobs inherit it, so it is released only when the last of them has ended.

    Yields the file descriptor of the lock, or None on systems without such locks. Raises ConfigError if the lock is taken.
    """
    directory = paths.path
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be created: {error}; choose another directory with --dir") from error
    try:
        import fcntl
    except ImportError:
        yield None
        return
    with paths.lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{directory} is in use by another `deepgrpo compare`, or by a run it left behind; wait for it, or "
                "end it (`ps` shows it as deepgrpo.cli train); --figures shows what is finished so far"
            ) from None
        yield file.fileno()


def _tune(plan: Plan, jobs: int, keep_open: Sequence[int], out: Console) -> Plan:
    """Run the trials of the undecided arms, record the choices, and return the plan with them."""
    open_trials = [run for run in plan.trials if run.arm in plan.undecided]
    codes = _run(plan, open_trials, jobs, keep_open, out)
    # any other failure, such as a lack of memory or run.steps that were over, is not the fault of the trial's values
    found = tuning(plan, [name for name, code in codes.items() if code == DivergenceError.exit_code])
    write_tuning(plan, found)
    _print_tuning(found, out)
    return expand(plan.experiment, plan.source, read_choices(plan))


def _run(plan: Plan, runs: Sequence[PlannedRun], workers: int, keep_open: Sequence[int], out: Console) -> dict[str, int]:
    """Run the jobs of a stage; returns the exit code of each that ran, after a warning for each that failed."""
    write_recipes(plan, runs)
    jobs = Jobs(make_jobs(plan, runs), workers=workers, keep_open=keep_open)
    if not runs:
        return {}
    done, stage = sum(progress(run).done for run in runs), "tuning, " if runs[0].trial else ""
    seeds, arms = len({run.seed for run in runs}), len({run.arm for run in runs})
    trials = max(len({run.trial.name for run in runs if run.trial and run.arm == arm}) for arm in {run.arm for run in runs})
    out.print(
        f"{plan.experiment.name}: {stage}{arms} arms × " + (f"{trials} trials × " if trials else "")
        + f"{seeds} seeds, {runs[0].budget:,} sampled tokens each"
        + (f"; {done} of {len(runs)} runs are finished already" if done else ""),
        markup=False, soft_wrap=True,
    )  # fmt: skip
    try:
        with Watch(runs, jobs, out) as watch:
            jobs.run(watch.changed, watch.tick)
    except KeyboardInterrupt:
        left = sum(not progress(run).done for run in runs)
        out.print(
            f"stopped; {len(runs) - left} of {len(runs)} runs are finished, the others were saved; continue "
            "with the same command",
            markup=False, soft_wrap=True,
        )  # fmt: skip
        raise
    for sentence in failures(plan, jobs):
        out.print(f"warning: {sentence}", style="yellow", markup=False, soft_wrap=True)
    return jobs.exit_codes


def _show(plan: Plan, out: Console) -> None:
    """Print the figures of what is finished."""
    at = {run.name: progress(run) for run in (*plan.trials, *plan.runs)}
    for stage, runs in (("trials", plan.trials), ("runs", plan.runs)):
        begun = sum(at[run.name].step > 0 and not at[run.name].done for run in runs)
        done = sum(at[run.name].done for run in runs)
        if runs:
            out.print(f"{stage}: {done} of {len(runs)} have sampled their budget, {begun} more have begun", markup=False)
    finished = [run for run in plan.decided if is_finished(plan, run)]
    if plan.trials and not finished:
        _print_tuning(tuning(plan), out)
    if finished:
        _print_comparison(compare(plan, finished, read_tuning(plan)), out)


def _print_tuning(found: Mapping[str, Any], out: Console) -> None:
    out.print(found["rule"], markup=False, soft_wrap=True)
    print_comparison(out, tuning_table(found))
    for line in choice_lines(found):
        out.print(f"· {line}", markup=False, soft_wrap=True)


def _print_comparison(result: Mapping[str, Any], out: Console) -> None:
    for table in comparison_tables(result):
        print_comparison(out, table)
    for note in result["notes"]:
        out.print(f"· {note}", markup=False, soft_wrap=True)


def _report(plan: Plan, finished: list[PlannedRun], jobs: int, out: Console) -> None:
    from deepgrpo.lab.machine import machine_and_versions

    result = {**compare(plan, finished, read_tuning(plan)), "jobs": jobs, **machine_and_versions()}
    paths = plan.paths
    paths.comparison.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    paths.figures.write_text(json.dumps(figure_rows(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    paths.page.write_text(as_markdown(result), encoding="utf-8")
    _print_comparison(result, out)
    files = [paths.comparison.name, paths.figures.name, paths.page.name]
    if can_draw():
        draw(result, paths.picture)
        files.append(paths.picture.name)
    else:
        out.print('no figure: matplotlib is not installed (pip install "deepgrpo[plots]")', markup=False, soft_wrap=True)
    out.print(f"{paths.path}: {', '.join(files)}", markup=False, soft_wrap=True)
