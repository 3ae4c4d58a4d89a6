"""All runs of an experiment, and the checks that keep their comparison fair. No torch.

    Experiment ─► expand ─► Plan: one warm start per seed, one run per seed and arm

Decided here: what arms may differ in, what they share, and that the final questions are not those watched while training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgrpo.config import Config, GeneratedData, ReasoningGymData, load_recipe, merge, parse_config, read_recipe
from deepgrpo.config.shipped import find_recipe
from deepgrpo.errors import ConfigError
from deepgrpo.lab.compare.experiment import Experiment, FinalConfig
from deepgrpo.runs.layout import RunDir

_RESERVED = ("run.name", "run.dir", "run.seed", "run.max_sampled_tokens")
"""Keys set by the experiment for every run."""
_SHARED = ("model", "warmstart", "eval")
"""Sections that no arm may change, so that arms remain comparable."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of an arm, or the warm start of a seed.

    Example: PlannedRun(arm="deep", seed=1, config=Config(...), directory=Path("runs/methods/arms/deep/seed-1")).
    """

    arm: str | None
    """None: the warm start that every arm of the seed begins with."""
    seed: int
    config: Config

    @property
    def directory(self) -> Path:
        return self.paths.path

    @property
    def paths(self) -> RunDir:
        return RunDir.of(self.config.run)

    @property
    def name(self) -> str:
        """Name of the run and of its files in `jobs/`; an arm cannot begin with an underscore."""
        return f"{self.arm or '_warmstart'}-seed-{self.seed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """All runs of an experiment."""

    experiment: Experiment
    source: Path
    """The experiment file."""
    warmstarts: tuple[PlannedRun, ...]
    """One per seed; none if the recipe has no warm start."""
    runs: tuple[PlannedRun, ...]
    """Seed by seed, arms in the order of the file, so that pairs complete as early as possible."""
    final: FinalConfig
    """The final evaluation, with its data filled in."""

    @property
    def directory(self) -> Path:
        return Path(self.experiment.dir) / self.experiment.name

    def of(self, arm: str) -> list[PlannedRun]:
        return [run for run in self.runs if run.arm == arm]


def expand(experiment: Experiment, source: Path) -> Plan:
    """Plan all runs of an experiment.

    Raises ConfigError: an override is invalid (the message names the arm), an arm changes a shared section, two arms have the
    same recipe, or the final questions are used in training or evaluation.
    """
    base = _base(experiment, source)
    _refuse_reserved(experiment.common, "common")
    shared = merge(base, experiment.common)
    template = parse_config(shared, source=f"{source}, common")
    if template.eval.every is None:
        raise ConfigError(
            f"{source}: the recipe {experiment.base!r} has no evaluation while training, so there are no curves to compare; "
            "set common.eval.every and a table [common.eval.data]"
        )
    folder = Path(experiment.dir) / experiment.name
    warmstarts, runs = [], []
    starts = _start_tables(template, folder, experiment.seeds)
    for seed in experiment.seeds:
        if template.warmstart is not None and template.warmstart.from_ is None:
            raw = _for_seed(shared, seed, str(folder / "warmstart"), f"seed-{seed}")
            raw["run"]["steps"] = 0  # warm start only
            warmstarts.append(PlannedRun(None, seed, parse_config(raw, source=f"{source}, warm start")))
        for arm, changes in experiment.arms.items():
            _refuse_reserved(changes, f"arms.{arm}")
            _refuse_shared(changes, arm)
            raw = _for_seed(merge(shared, changes), seed, str(folder / "arms" / arm), f"seed-{seed}")
            raw["run"]["max_sampled_tokens"] = experiment.budget
            if "reward" in changes and template.eval.reward is None:
                # an arm's own reward is for training; evaluations judge all arms alike
                judge = {key: value for key, value in shared["reward"].items() if key != "overlong"}
                raw["eval"] = {**raw["eval"], "reward": judge}
            if seed in starts:
                raw["warmstart"] = starts[seed]
            runs.append(PlannedRun(arm, seed, parse_config(raw, source=f"{source}, arm {arm!r}")))
    _refuse_twins(runs, source)
    final = _final(experiment, template, source)
    return Plan(experiment, source, tuple(warmstarts), tuple(runs), final)


# ---------------------------------------------------------------- parts


def _base(experiment: Experiment, source: Path) -> dict[str, Any]:
    """The base recipe as a nested dict, checked on its own."""
    beside = source.parent / experiment.base
    path = beside if beside.suffix == ".toml" and beside.is_file() else find_recipe(experiment.base)
    load_recipe(path)
    return read_recipe(path)


def _for_seed(recipe: Mapping[str, Any], seed: int, directory: str, name: str) -> dict[str, Any]:
    """A recipe for one seed. Generated questions differ by seed: a seed repeats the whole procedure."""
    raw = merge(recipe, {"run": {"seed": seed, "dir": directory, "name": name}})
    data = raw.get("data")
    if isinstance(data, dict) and data.get("type") in ("synthetic", "search"):
        # its splits are disjoint for any seed; other generated data may separate evaluation by the seed alone
        raw["data"] = {**data, "seed": data.get("seed", 0) + seed}
    return raw


def _start_tables(template: Config, folder: Path, seeds: Sequence[int]) -> dict[int, dict[str, str]]:
    """Seed → [warmstart] of its arms, which names the weights of the seed's warm start."""
    if template.warmstart is None or template.warmstart.from_ is not None:
        return {}
    return {seed: {"from": str(RunDir(folder / "warmstart" / f"seed-{seed}").start)} for seed in seeds}


def _refuse_reserved(changes: Mapping[str, Any], where: str) -> None:
    for dotted in _RESERVED:
        section, _, key = dotted.partition(".")
        table = changes.get(section)
        if isinstance(table, Mapping) and key in table:
            raise ConfigError(
                f"{where}.{dotted} is {table[key]!r}, but the experiment sets that key for every run (name, dir, seeds, "
                "budget); remove it"
            )


def _refuse_shared(changes: Mapping[str, Any], arm: str) -> None:
    for section in _SHARED:
        if section in changes:
            raise ConfigError(
                f"arms.{arm}.{section} is {changes[section]!r}, but all arms must share the same [{section}] to "
                f"be comparable; move it to [common.{section}], or remove it"
            )


def _refuse_twins(runs: Sequence[PlannedRun], source: Path) -> None:
    """Raise ConfigError if two arms have the same recipe, which would repeat a run bit for bit."""
    seen: list[PlannedRun] = []
    for run in runs:
        if run.seed != runs[0].seed:
            continue
        for other in seen:
            if _without_place(other.config) == _without_place(run.config):
                raise ConfigError(
                    f"{source}: the arms {other.arm!r} and {run.arm!r} are the same recipe, so their runs would be equal to "
                    "the last bit; was an override forgotten? Remove one of them"
                )
        seen.append(run)


def _without_place(config: Config) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": "", "name": "x"})})


def _final(experiment: Experiment, template: Config, source: Path) -> FinalConfig:
    """The final evaluation. Raises ConfigError if its questions are those of training or of eval.data."""
    watched, wanted = template.eval.data, experiment.final.data
    assert watched is not None  # eval.every is set, and that needs eval.data
    if wanted is None:
        if not isinstance(watched, GeneratedData | ReasoningGymData):
            raise ConfigError(
                f"{source}: final.data is missing: with eval.data of type {watched.type!r} there is no way to generate "
                "other questions; add a table [final.data] with questions that are neither trained on nor watched"
            )
        wanted = watched.model_copy(update={"seed": 1 + max(watched.seed, getattr(template.data, "seed", 0))})
    if wanted == watched:
        raise ConfigError(
            f"{source}: final.data is the same as eval.data, which is watched while training; name other questions (for "
            "generated data another seed), or leave it out"
        )
    if isinstance(wanted, GeneratedData) and isinstance(template.data, GeneratedData) and wanted.split == template.data.split:
        raise ConfigError(
            f"{source}: final.data.split is {wanted.split!r}, and so is data.split: the arms are trained on those questions; "
            'set final.data.split = "test" and data.split = "train"'
        )
    same_file = getattr(wanted, "path", None) is not None and _rows_of(wanted) == _rows_of(template.data)
    if same_file or wanted == template.data:
        raise ConfigError(f"{source}: final.data is the training data; name questions that no arm is trained on")
    sampling = experiment.final.sampling or template.sampling
    return experiment.final.model_copy(update={"data": wanted, "sampling": sampling})


def _rows_of(data: Any) -> tuple[Any, ...]:
    """The keys that identify the rows of a file or data set."""
    return tuple(getattr(data, key, None) for key in ("type", "path", "name", "split"))
