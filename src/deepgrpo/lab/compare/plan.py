"""All runs of an experiment, and the checks that keep their comparison fair. No torch.

    Experiment ─► expand ─► Plan: one warm start per seed, one run per seed and arm,
                            and before them the trials of the tuning stage, one run per seed, arm and point of the grid

Decided here: what arms may differ in, what they share, and that the final questions are not those watched while training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepgrpo.config import Config, GeneratedData, ReasoningGymData, load_recipe, merge, parse_config, read_recipe
from deepgrpo.config.data import GENERATED
from deepgrpo.config.shipped import find_recipe
from deepgrpo.errors import ConfigError
from deepgrpo.lab.compare.experiment import Experiment, FinalConfig
from deepgrpo.lab.compare.grid import Trial, Value, fixed_values, nested, trials_of
from deepgrpo.lab.compare.layout import ExperimentDir, seed_name
from deepgrpo.runs.layout import RunDir

_RESERVED = ("run.name", "run.dir", "run.seed", "run.max_sampled_tokens")
"""Keys set by the experiment for every run."""
_SHARED = ("model", "warmstart", "eval")
"""Sections that no arm may change, so that arms remain comparable."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of an arm, a trial of its tuning, or the warm start of a seed.

    Example: PlannedRun(arm="deep", seed=1, config=Config(...)), whose directory is runs/methods/arms/deep/seed-1.
    """

    arm: str | None
    """None: the warm start that every arm of the seed begins with."""
    seed: int
    config: Config
    trial: Trial | None = None
    """The values that a trial of the tuning stage tries; None for a fresh run."""

    @property
    def directory(self) -> Path:
        return self.paths.path

    @property
    def paths(self) -> RunDir:
        return RunDir.of(self.config.run)

    @property
    def name(self) -> str:
        """Name of the run and of its files in `jobs/`. No arm's name begins with an underscore or has an equals sign."""
        trial = f"-{self.trial.name}" if self.trial else ""
        return f"{self.arm or '_warmstart'}{trial}-{seed_name(self.seed)}"

    @property
    def budget(self) -> int:
        """Sampled tokens at which the run ends; 0 for a warm start."""
        return self.config.run.max_sampled_tokens or 0


@dataclass(frozen=True, slots=True)
class Plan:
    """All runs of an experiment."""

    experiment: Experiment
    source: Path
    """The experiment file."""
    warmstarts: tuple[PlannedRun, ...]
    """One per seed, those of the tuning stage first; a single one with `shared_start`; none if the recipe has no warm start."""
    runs: tuple[PlannedRun, ...]
    """The fresh runs, seed by seed, arms in the order of the file, so that pairs complete as early as possible. Those of an
    undecided arm have the values of its first trial, and must not be run."""
    final: FinalConfig
    """The final evaluation, with its data filled in."""
    trials: tuple[PlannedRun, ...] = ()
    """Runs of the tuning stage, in the same order; none without a section [tune], and none for an arm with nothing to try."""
    undecided: frozenset[str] = frozenset()
    """Arms whose trials have not led to a choice yet."""

    @property
    def paths(self) -> ExperimentDir:
        return _paths(self.experiment)

    @property
    def directory(self) -> Path:
        return self.paths.path

    def warmstart_of(self, seed: int) -> PlannedRun | None:
        """The warm start that the runs of a seed begin from."""
        wanted = _start_seed(self.experiment, seed)
        return next((run for run in self.warmstarts if run.seed == wanted), None)

    def of(self, arm: str) -> list[PlannedRun]:
        return [run for run in self.runs if run.arm == arm]

    def trials_of(self, arm: str) -> list[PlannedRun]:
        return [run for run in self.trials if run.arm == arm]

    @property
    def decided(self) -> tuple[PlannedRun, ...]:
        """The fresh runs whose recipe is known."""
        return tuple(run for run in self.runs if run.arm not in self.undecided)


def expand(experiment: Experiment, source: Path, chosen: Mapping[str, Mapping[str, Value]] | None = None) -> Plan:
    """Plan all runs of an experiment.

    Args:
        chosen: values of the tuned keys by arm, for the arms whose tuning is over.

    Raises ConfigError: an override is invalid (the message names the arm), an arm changes a shared section, two arms have the
    same recipe, or the final questions are used in training or evaluation.
    """
    chosen = chosen or {}
    base = _base(experiment, source)
    _refuse_reserved(experiment.common, "common")
    shared = merge(base, experiment.common)
    template = parse_config(shared, source=f"{source}, common")
    if not template.eval.scheduled:
        raise ConfigError(
            f"{source}: the recipe {experiment.base!r} has no evaluation while training, so there are no curves to compare; "
            "set common.eval.every_tokens (or common.eval.every) and a table [common.eval.data]"
        )
    tune, paths = experiment.tune, _paths(experiment)
    grid = tune.grid if tune else {}
    if tune is not None and tune.metric == "sampled" and not template.eval.samples:
        raise ConfigError(
            f'{source}: tune.metric is "sampled", but eval.samples is 0; set common.eval.samples to 1 or more, or choose by '
            '"greedy"'
        )
    for arm, changes in experiment.arms.items():
        _refuse_reserved(changes, f"arms.{arm}")
        _refuse_shared(changes, f"arms.{arm}")
    tuned = nested(grid)
    _refuse_reserved(tuned, "tune.grid")
    _refuse_shared(tuned, "tune.grid")

    def planned(arm: str, seed: int, trial: Trial | None, budget: int, folder: Path, *, is_trial: bool) -> PlannedRun:
        changes = experiment.arms[arm]
        raw = _for_seed(merge(merge(shared, changes), trial.changes() if trial else {}), seed, folder)
        raw["run"]["max_sampled_tokens"] = budget
        if "reward" in changes and template.eval.reward is None:
            # an arm's own reward is for training; evaluations judge all arms alike
            judge = {key: value for key, value in shared["reward"].items() if key != "overlong"}
            raw["eval"] = {**raw["eval"], "reward": judge}
        if _trains_start(template):
            start = paths.warmstarts / seed_name(_start_seed(experiment, seed))
            raw["warmstart"] = {"from": str(RunDir(start).start)}
        where = f"{source}, arm {arm!r}" + (f" with {trial.name}" if trial else "")
        return PlannedRun(arm, seed, parse_config(raw, source=where), trial if is_trial else None)

    tries = {arm: trials_of(grid, changes) for arm, changes in experiment.arms.items()}
    tune_seeds, tune_budget = (tune.seeds, tune.budget) if tune else ((), 0)
    trials = [
        planned(arm, seed, trial, tune_budget, paths.trial(arm, trial.name), is_trial=True)
        for seed in tune_seeds for arm in tries for trial in tries[arm] if len(tries[arm]) > 1
    ]  # fmt: skip
    best = {arm: Trial("its choice", chosen[arm]) if arm in chosen else (each or (None,))[0] for arm, each in tries.items()}
    runs = [
        planned(arm, seed, best[arm], experiment.budget, paths.arm(arm), is_trial=False)
        for seed in experiment.seeds for arm in experiment.arms
    ]  # fmt: skip
    warmstarts = []
    starts = dict.fromkeys(_start_seed(experiment, seed) for seed in (*tune_seeds, *experiment.seeds))
    for seed in starts if _trains_start(template) else ():
        raw = _for_seed(shared, seed, paths.warmstarts)
        raw["run"]["steps"] = 0  # warm start only
        warmstarts.append(PlannedRun(None, seed, parse_config(raw, source=f"{source}, warm start")))
    _refuse_twins(experiment, shared, source)
    undecided = frozenset(arm for arm, each in tries.items() if len(each) > 1 and arm not in chosen)
    final = _final(experiment, template, source)
    return Plan(experiment, source, tuple(warmstarts), tuple(runs), final, tuple(trials), undecided)


# ---------------------------------------------------------------- parts


def _base(experiment: Experiment, source: Path) -> dict[str, Any]:
    """The base recipe as a nested dict, checked on its own."""
    beside = source.parent / experiment.base
    path = beside if beside.suffix == ".toml" and beside.is_file() else find_recipe(experiment.base)
    load_recipe(path)
    return read_recipe(path)


def _paths(experiment: Experiment) -> ExperimentDir:
    return ExperimentDir(Path(experiment.dir) / experiment.name)


def _trains_start(template: Config) -> bool:
    """True if the recipe trains a warm start, which the runs of a seed then share."""
    return template.warmstart is not None and template.warmstart.from_ is None


def _start_seed(experiment: Experiment, seed: int) -> int:
    """Seed of the warm start that the runs of `seed` begin from."""
    return experiment.seeds[0] if experiment.shared_start else seed


def _for_seed(recipe: Mapping[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """A recipe for one seed. Generated questions differ by seed: a seed repeats the whole procedure."""
    raw = merge(recipe, {"run": {"seed": seed, "dir": str(folder), "name": seed_name(seed)}})
    data = raw.get("data")
    if isinstance(data, dict) and data.get("type") in GENERATED:
        # its splits are disjoint for any seed; other generated data may separate evaluation by the seed alone
        raw["data"] = {**data, "seed": data.get("seed", 0) + seed}
    return raw


def _refuse_reserved(changes: Mapping[str, Any], where: str) -> None:
    for dotted in _RESERVED:
        section, _, key = dotted.partition(".")
        table = changes.get(section)
        if isinstance(table, Mapping) and key in table:
            raise ConfigError(
                f"{where}.{dotted} is {table[key]!r}, but the experiment sets that key for every run (name, dir, seeds, "
                "budget); remove it"
            )


def _refuse_shared(changes: Mapping[str, Any], where: str) -> None:
    for section in _SHARED:
        if section in changes:
            raise ConfigError(
                f"{where}.{section} is {changes[section]!r}, but all arms must share the same [{section}] to be comparable; "
                f"move it to [common.{section}], or remove it"
            )


def _refuse_twins(experiment: Experiment, shared: Mapping[str, Any], source: Path) -> None:
    """Raise ConfigError if two arms have the same recipe, which would repeat a run bit for bit.

    Arms of which one fixes what is tuned for the other are different, whatever is chosen.
    """
    seen: dict[str, tuple[Config, set[str]]] = {}
    for arm, changes in experiment.arms.items():
        fixed = set(fixed_values(experiment.tune.grid, changes)) if experiment.tune else set()
        recipe = parse_config(merge(shared, changes), source=f"{source}, arm {arm!r}"), fixed
        for other in seen:
            if seen[other] == recipe:
                raise ConfigError(
                    f"{source}: the arms {other!r} and {arm!r} are the same recipe, so their runs would be equal to the last "
                    "bit; was an override forgotten? Remove one of them"
                )
        seen[arm] = recipe


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
