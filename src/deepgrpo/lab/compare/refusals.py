"""Refusals before any run starts: budgets out of reach, and runs of another recipe in the experiment's directory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepgrpo.config import Config, load_recipe
from deepgrpo.errors import ConfigError
from deepgrpo.lab.compare.grid import flatten
from deepgrpo.lab.compare.plan import Plan, PlannedRun
from deepgrpo.lab.compare.progress import is_kept


def refuse_unreachable(plan: Plan) -> None:
    """Raise ConfigError if an arm cannot sample its budget within run.steps even with responses of maximum length."""
    from deepgrpo.train.dry_run import estimate_tokens

    for run in (*plan.trials, *plan.runs):
        config = run.config
        most = estimate_tokens(config).total * (config.sampling.max_rounds if config.sampling.dynamic else 1)
        if most * config.run.steps < run.budget:
            stage = f" of tune.budget = {run.budget:,}" if run.trial else f" of {run.budget:,}"
            raise ConfigError(
                f"the arm {run.arm!r} cannot reach the budget{stage} sampled tokens: its run.steps = "
                f"{config.run.steps} steps sample at most {most:,} each; set common.run.steps to at least "
                f"{-(-run.budget // most)} (and well above: most responses are shorter than the limit), or lower the budget"
            )


def refuse_changed(runs: Sequence[PlannedRun]) -> None:
    """Raise ConfigError if the directory of a run holds one that was made with a different recipe.

    A longer run or a larger budget counts as the same recipe if the learning rate does not depend on it.
    """
    for run in runs:
        path = run.paths.config
        if not path.is_file() or not is_kept(run):
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


def _length(config: Config) -> tuple[int, int]:
    return config.run.max_sampled_tokens or 0, config.run.steps


def _freed(config: Config) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"steps": 0, "max_sampled_tokens": None})})


def _flat(config: Config) -> dict[str, Any]:
    # neither the location of a run nor the threads that it has found is part of its recipe
    own = ("run.dir", "run.name", "run.threads", "warmstart.from")
    return {key: value for key, value in flatten(config.model_dump(mode="json")) if key not in own}
