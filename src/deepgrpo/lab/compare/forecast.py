"""`deepgrpo compare --dry-run`: estimate the runs, tokens and minutes of an experiment before starting it.

Seconds per token come from finished runs of the arm if there are any, else from two small steps of the arm after a warm
start of a few seconds, in a temporary directory. Such a calibration uses a weaker model and fewer prompts than the runs:
take it as an order of magnitude.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from deepgrpo.config import Config, to_toml
from deepgrpo.errors import ConfigError
from deepgrpo.lab.compare.jobs import environment, last_line
from deepgrpo.lab.compare.plan import Plan, PlannedRun
from deepgrpo.lab.compare.progress import has_budget, progress
from deepgrpo.progress import Display, phase, showing
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.metrics import read_metrics
from deepgrpo.terminal import Terminal, print_columns

_WARM_STEPS, _STEPS, _PROMPTS = 40, 2, 16


@dataclass(frozen=True, slots=True)
class Pace:
    """Speed of an arm.

    Example: Pace(per_token=5e-5, tokens_per_step=250_000.0, evaluation=1.2, source="2 finished runs").
    """

    per_token: float
    """Seconds per sampled token, including sampling, rewards and learning."""
    tokens_per_step: float
    evaluation: float
    """Seconds of one evaluation during training."""
    source: str

    def seconds(self, config: Config, budget: int, final_answers: float, watched_answers: float) -> float:
        """Seconds of a whole run: steps, evaluations, and the final evaluation."""
        steps = budget / self.tokens_per_step
        marks = budget / config.eval.every_tokens if config.eval.every_tokens else steps / (config.eval.every or steps)
        # with large steps, several marks are passed in one
        evaluations = 2.0 + min(steps, marks)
        return budget * self.per_token + self.evaluation * (evaluations + final_answers / watched_answers)


def forecast(plan: Plan, jobs: int, out: Console) -> None:
    """Print a table of the arms and the total cost; no run of the experiment is started.

    Raises ConfigError if an arm cannot take a single step.
    """
    known = {arm: _from_runs([*plan.of(arm), *plan.trials_of(arm)]) for arm in plan.experiment.arms}
    paces = {arm: pace for arm, pace in known.items() if pace}
    missing = [arm for arm in plan.experiment.arms if arm not in paces]
    if missing:
        out.print(f"no finished run of {', '.join(missing)}: measuring two small steps of each", markup=False, soft_wrap=True)
        with Display(Terminal(stderr=True)) as display, showing(display):
            paces |= _calibrate(plan, missing, jobs)
    paces = {arm: paces[arm] for arm in known}
    final = plan.final
    answers = final.limit + final.sampled_limit * (1 + final.samples)
    open_trials = [run for run in plan.trials if run.arm in plan.undecided]
    total = 0.0
    if open_trials:
        total += _stage(f"{plan.experiment.name}: tuning", open_trials, paces, 0, out)
    total += _stage(plan.experiment.name, plan.runs, paces, answers, out)
    runs = [run for run in (*open_trials, *plan.runs) if not has_budget(run)]
    needed = {run.seed for run in runs} - {run.seed for run in (*plan.trials, *plan.runs) if progress(run).step}
    warm = len({start.seed for seed in needed if (start := plan.warmstart_of(seed)) and not start.paths.start.is_dir()})
    out.print(
        f"{len(runs)} runs, {sum(run.budget for run in runs):,} sampled tokens, about "
        f"{_duration(total / jobs)} with --jobs {jobs}" + (f", and {warm} warm starts before them" if warm else ""),
        markup=False, soft_wrap=True,
    )  # fmt: skip
    out.print("dry run: nothing was trained")


def _stage(
    title: str, runs: Sequence[PlannedRun], paces: Mapping[str, Pace], final_answers: float, out: Console
) -> float:
    """Print the table of a stage; returns the seconds of its runs that are left, one after the other."""
    columns = ("arm", "runs left", "tokens each", "steps each, about", "minutes each, about", "from")
    rows = []
    total = 0.0
    for arm, pace in paces.items():
        mine = [run for run in runs if run.arm == arm]
        if not mine:
            continue
        left, config, budget = sum(not has_budget(run) for run in mine), mine[0].config, mine[0].budget
        seconds = pace.seconds(config, budget, final_answers, config.eval.limit * (1 + config.eval.samples))
        total += seconds * left
        rows.append(
            (arm, str(left), f"{budget:,}", f"{budget / pace.tokens_per_step:.0f}", f"{seconds / 60:.1f}", pace.source)
        )
    print_columns(out, columns, rows, title=title, left=(0, 5))
    return total


def _from_runs(runs: list[PlannedRun]) -> Pace | None:
    paces = [_pace(read_metrics(run.paths.metrics), "") for run in runs if has_budget(run)]
    if not paces:
        return None
    n = len(paces)
    return Pace(
        sum(p.per_token for p in paces) / n, sum(p.tokens_per_step for p in paces) / n,
        sum(p.evaluation for p in paces) / n, f"{n} finished run{'s' if n > 1 else ''}",
    )  # fmt: skip


def _pace(lines: list[dict[str, Any]], source: str, *, first: int = 1, scale: float = 1.0) -> Pace:
    """Speed from the metrics of a run, from step `first` on; `scale`: prompts per step of the arm over those of this run."""
    steps = [line for line in lines if line["step"] >= first]
    tokens = sum(line["sampled_tokens"] for line in steps)
    evaluations = [line["time/eval"] for line in lines if line.get("time/eval") is not None]
    seconds = sum(line["time/step"] - (line.get("time/eval") or 0.0) for line in steps)
    return Pace(seconds / tokens, scale * tokens / len(steps), sum(evaluations) / max(1, len(evaluations)), source)


def _calibrate(plan: Plan, arms: list[str], jobs: int) -> dict[str, Pace]:
    """Time two small steps of each arm in a temporary directory; the first one warms up and is not counted."""
    paces: dict[str, Pace] = {}
    warmstarts = plan.warmstarts[:1]
    with (
        tempfile.TemporaryDirectory(prefix="deepgrpo-forecast-") as folder,
        phase("trials", len(warmstarts) + len(arms)) as advance,
    ):
        start: dict[str, str] | None = None
        for warm in warmstarts:
            settings = warm.config.model_dump(mode="json")
            steps = min(_WARM_STEPS, settings["warmstart"]["steps"])
            settings["warmstart"] |= {"steps": steps, "target_accuracy": None}
            with phase("a short warm start"):
                start = {"from": str(_train(settings, Path(folder), "warm", jobs).start)}
            advance()
        for i, arm in enumerate(arms):
            config = plan.of(arm)[0].config
            settings = config.model_dump(mode="json")
            prompts = min(_PROMPTS, config.run.prompts_per_step)
            settings["run"] |= {"steps": _STEPS, "prompts_per_step": prompts, "max_sampled_tokens": None}
            settings["optim"]["minibatches"] = min(settings["optim"]["minibatches"], prompts)
            if start is not None:
                settings["warmstart"] = start
            with phase(f"two steps of {arm}"):
                run = _train(settings, Path(folder), f"arm-{i}", jobs)
            advance()
            scale = config.run.prompts_per_step / prompts
            paces[arm] = _pace(read_metrics(run.metrics), "two small steps", first=_STEPS, scale=scale)
    return paces


def _train(settings: Mapping[str, Any], folder: Path, name: str, jobs: int) -> RunDir:
    """Run a recipe in a separate process. Raises ConfigError with its last output if it fails."""
    raw = {**settings, "run": {**settings["run"], "dir": str(folder), "name": name}}
    recipe, log = folder / f"{name}.toml", folder / f"{name}.log"
    recipe.write_text(to_toml(Config.model_validate(raw)), encoding="utf-8")
    with log.open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "deepgrpo.cli", "train", str(recipe)], stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, env=environment(jobs), check=False,
        )  # fmt: skip
    if done.returncode:
        raise ConfigError(f"a trial of two steps failed: {last_line(log)}; the recipe was:\n{recipe.read_text()}")
    return RunDir(folder / name)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
