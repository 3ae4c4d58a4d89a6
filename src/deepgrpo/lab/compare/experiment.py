"""An experiment file: arms × seeds from one base recipe, and the runs that it stands for. No torch.

    experiment.toml ─► Experiment ─► expand ─► Plan: a warm start per seed, a run per seed and arm

All that makes a comparison fair is decided here: what arms may differ in, what they share, and that what is measured in the
end is not what was watched on the way. docs/compare.md has an example with every key.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, field_validator, model_validator

from deepgrpo.config import (
    Config,
    DataConfig,
    ReasoningGymData,
    SamplingConfig,
    Section,
    SyntheticData,
    load_recipe,
    merge,
    parse_config,
    parse_section,
    read_recipe,
)
from deepgrpo.config.base import Probability
from deepgrpo.config.shipped import find_recipe, recipe_dir
from deepgrpo.errors import ConfigError


class FinalConfig(Section):
    """What the finished runs are measured on: questions that nobody looked at before."""

    data: DataConfig | None = None
    """The untouched questions; default, for generated data: as eval.data, with a seed of their own. Questions that are also
    watched while training are left out and counted."""
    limit: PositiveInt = 1024
    """Questions that are answered greedily."""
    sampled_limit: PositiveInt = 256
    """The first so many of them are also sampled."""
    samples: Annotated[int, Field(ge=2)] = 64
    """Sampled responses for each of those."""
    k: tuple[PositiveInt, ...] = (1, 4, 16, 64)
    """pass@k for these k; each at most `samples`."""
    sampling: SamplingConfig | None = None
    """How they are answered; default: the common recipe's [sampling], also for an arm that trains with another."""

    @model_validator(mode="after")
    def _enough_samples(self) -> FinalConfig:
        if self.k and max(self.k) > self.samples:
            raise ValueError(
                f"final.k has {max(self.k)}, but final.samples is {self.samples}: pass@k needs at least k samples; raise "
                "final.samples or drop that k"
            )
        return self


class CurveConfig(Section):
    """What is read off the learning curves, which are watched on eval.data while training."""

    last: PositiveInt | None = None
    """Mean of so many last evaluations; default: 10."""
    last_share: Probability | None = None
    """In place of `last`: of those in the last part of the budget, e.g. 0.2. The same stretch of tokens for every arm, also
    where the arms are evaluated at different intervals of tokens."""
    target: Probability | None = None
    """The greedy accuracy for "tokens to reach"; absent: not reported."""

    @model_validator(mode="after")
    def _one_of_them(self) -> CurveConfig:
        if self.last is not None and self.last_share is not None:
            raise ValueError(
                f"curve.last is {self.last} and curve.last_share is {self.last_share}; they say the same thing in two ways: "
                "remove one"
            )
        if self.last_share == 0:
            raise ValueError("curve.last_share is 0, which holds no evaluation; set it to e.g. 0.2")
        return self

    @property
    def window(self) -> tuple[int | None, float | None]:
        """(last, share), exactly one of them set."""
        return (None, self.last_share) if self.last_share is not None else (self.last or 10, None)


class Experiment(Section):
    """A whole experiment file."""

    name: str
    """Directory of the experiment inside `dir`."""
    dir: str = "runs"
    """Directory that holds it."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (1, 2, 3, 4, 5)
    """A run of every arm for each; at least two."""
    baseline: str
    """The arm that the others are compared with."""
    budget: PositiveInt
    """Sampled tokens per run."""
    base: str
    """The recipe that all arms share: a name (see `deepgrpo recipes`), or a path from here or from the experiment file."""
    common: dict[str, Any] = Field(default_factory=dict)
    """Changes to that recipe for all arms."""
    arms: dict[str, dict[str, Any]]
    """By the arm's name: its changes to the recipe. A table of another `type` replaces the recipe's as a whole, any other is
    merged key by key."""
    final: FinalConfig = FinalConfig()
    curve: CurveConfig = CurveConfig()

    @field_validator("seeds")
    @classmethod
    def _paired(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            raise ValueError(f"seeds has {twice[0]} twice: it would be the same run again; name every seed once")
        if len(seeds) < 2:
            raise ValueError(
                f"seeds is {list(seeds)}, but paired intervals need at least two seeds (five or more to say much); a single "
                "pair of runs shows nothing: add some"
            )
        return seeds

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"name is {name!r}; it names a directory: use letters, digits, '-', '_', '+' and '.'")
        return name

    @model_validator(mode="after")
    def _arms_fit(self) -> Experiment:
        if not self.arms:
            raise ValueError("arms is empty: there is nothing to compare; add a table [arms.NAME] for each arm")
        seen: dict[str, str] = {}
        for arm in self.arms:
            if not _NAME.fullmatch(arm):
                raise ValueError(
                    f"arms has {arm!r}; an arm's name is also a directory: use letters, digits, '-', '_', '+' and '.'"
                )
            if arm.lower() in seen:
                raise ValueError(
                    f"arms has {seen[arm.lower()]!r} and {arm!r}, which clash: they are one directory where file names know "
                    "no case; rename one"
                )
            seen[arm.lower()] = arm
        if len(self.arms) < 2:
            raise ValueError(f"arms has {list(self.arms)} alone, and nothing to compare it with; add another [arms.NAME]")
        if self.baseline not in self.arms:
            close = difflib.get_close_matches(self.baseline, list(self.arms), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the arms are: {', '.join(self.arms)}"
            raise ValueError(f"baseline is {self.baseline!r}, which is no arm; {hint}")
        return self


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.-]*")

_OURS = ("run.name", "run.dir", "run.seed", "run.max_sampled_tokens")
"""Keys that the experiment sets for every run."""
_SHARED = ("model", "warmstart", "eval")
"""What all arms have in common, or the comparison would not be one."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of an arm, or the warm start of a seed.

    Example: PlannedRun(arm="deep", seed=1, config=Config(...), directory=Path("runs/methods/arms/deep/seed-1")).
    """

    arm: str | None
    """None: the warm start of the seed, which every arm of the seed begins with."""
    seed: int
    config: Config

    @property
    def directory(self) -> Path:
        return Path(self.config.run.dir) / self.config.run.name

    @property
    def name(self) -> str:
        """What it is called, and its files in `jobs/`; no arm can begin with an underscore."""
        return f"{self.arm or '_warmstart'}-seed-{self.seed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that an experiment is going to do."""

    experiment: Experiment
    source: Path
    """The experiment file."""
    warmstarts: tuple[PlannedRun, ...]
    """One per seed; none if the recipe has no warm start."""
    runs: tuple[PlannedRun, ...]
    """Seed by seed, the arms in the order of the file: pairs are complete as early as can be."""
    final: FinalConfig
    """With its data filled in."""

    @property
    def directory(self) -> Path:
        return Path(self.experiment.dir) / self.experiment.name

    def of(self, arm: str) -> list[PlannedRun]:
        return [run for run in self.runs if run.arm == arm]


def find_experiment(name: str) -> Path:
    """The file of an experiment given by path, or by the name of one that comes along (`recipes/lab/`).

    Raises ConfigError, with the nearest name, if there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = sorted(recipe_dir().glob("lab/*.toml"))
    if path.suffix != ".toml" and len(path.parts) == 1:
        for each in shipped:
            if each.stem == name:
                return each
    names = [each.stem for each in shipped]
    close = difflib.get_close_matches(path.stem, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"those that come along are: {', '.join(names)}"
    raise ConfigError(f"experiment {name!r} does not exist; {hint}")


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment file. Raises ConfigError that names the key, the value and the remedy."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        said = str(error)
        # TOML's own word for a second [arms.NAME]
        twice = "; are there two arms of the same name?" if "twice" in said or "overwrite" in said else ""
        raise ConfigError(f"experiment {str(path)!r} cannot be read: {said}{twice}") from None
    if "explore" in raw or "run" in raw:
        raise ConfigError(
            f"{str(path)!r} looks like a recipe, not like an experiment (it has {'[explore]' if 'explore' in raw else '[run]'}"
            "); an experiment names a base recipe and its [arms.NAME]: see docs/compare.md, or run it with deepgrpo train"
        )
    return parse_section(Experiment, raw, str(path))


def expand(experiment: Experiment, source: Path) -> Plan:
    """All runs of an experiment.

    Raises ConfigError: an override is invalid (named with its arm), an arm changes what all must share, two arms are the
    same recipe, the untouched questions are not untouched.
    """
    base = _base(experiment, source)
    _refuse_ours(experiment.common, "common", _OURS)
    shared = merge(base, experiment.common)
    template = parse_config(shared, source=f"{source}, common")
    if template.eval.every is None:
        raise ConfigError(
            f"{source}: the recipe {experiment.base!r} has no evaluation while training, so there are no curves to compare; "
            "set common.eval.every and a table [common.eval.data]"
        )
    place = Path(experiment.dir) / experiment.name
    warmstarts, runs = [], []
    starts = _start_tables(template, place, experiment.seeds)
    for seed in experiment.seeds:
        if template.warmstart is not None and template.warmstart.from_ is None:
            raw = _for_seed(shared, seed, str(place / "warmstart"), f"seed-{seed}")
            raw["run"]["steps"] = 0  # the warm start alone
            warmstarts.append(PlannedRun(None, seed, parse_config(raw, source=f"{source}, warm start")))
        for arm, changes in experiment.arms.items():
            _refuse_ours(changes, f"arms.{arm}", _OURS)
            _refuse_shared(changes, arm)
            raw = _for_seed(merge(shared, changes), seed, str(place / "arms" / arm), f"seed-{seed}")
            raw["run"]["max_sampled_tokens"] = experiment.budget
            if "reward" in changes and template.eval.reward is None:
                # a reward of its own is for training: answers are judged alike for all arms
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
    """The base recipe as a nested dict, after it has been checked by itself."""
    beside = source.parent / experiment.base
    path = beside if beside.suffix == ".toml" and beside.is_file() else find_recipe(experiment.base)
    load_recipe(path)
    return read_recipe(path)


def _for_seed(recipe: Mapping[str, Any], seed: int, directory: str, name: str) -> dict[str, Any]:
    """A recipe for one seed. Generated questions are others for each: seeds stand for the whole procedure repeated."""
    raw = merge(recipe, {"run": {"seed": seed, "dir": directory, "name": name}})
    data = raw.get("data")
    if isinstance(data, dict) and data.get("type") == "synthetic":
        # its splits share no question whatever the seed; other generated data may keep evaluation apart by the seed alone
        raw["data"] = {**data, "seed": data.get("seed", 0) + seed}
    return raw


def _start_tables(template: Config, place: Path, seeds: Sequence[int]) -> dict[int, dict[str, str]]:
    """The [warmstart] of the arms of each seed: the weights of the seed's one warm start."""
    if template.warmstart is None or template.warmstart.from_ is not None:
        return {}
    return {seed: {"from": str(place / "warmstart" / f"seed-{seed}" / "start")} for seed in seeds}


def _refuse_ours(changes: Mapping[str, Any], where: str, keys: Sequence[str]) -> None:
    for dotted in keys:
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
                f"arms.{arm}.{section} is {changes[section]!r}, but all arms must share the same [{section}], or they could "
                f"not be compared; move it to [common.{section}], or remove it"
            )


def _refuse_twins(runs: Sequence[PlannedRun], source: Path) -> None:
    """Two arms of one recipe would be the same run twice, bit for bit."""
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
    """The untouched questions. Raises ConfigError if they are those of the training, or those that are watched."""
    watched, wanted = template.eval.data, experiment.final.data
    assert watched is not None  # eval.every is set, and that needs eval.data
    if wanted is None:
        if not isinstance(watched, SyntheticData | ReasoningGymData):
            raise ConfigError(
                f"{source}: final.data is missing: with eval.data of type {watched.type!r} there are no other questions to be "
                "had; add a table [final.data] with questions that are neither trained on nor watched"
            )
        wanted = watched.model_copy(update={"seed": 1 + max(watched.seed, getattr(template.data, "seed", 0))})
    if wanted == watched:
        raise ConfigError(
            f"{source}: final.data is the same as eval.data, which is watched while training; name other questions (for "
            "generated data another seed), or leave it out"
        )
    if isinstance(wanted, SyntheticData) and isinstance(template.data, SyntheticData) and wanted.split == template.data.split:
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
    """What names the rows of a file or a data set."""
    return tuple(getattr(data, key, None) for key in ("type", "path", "name", "split"))
