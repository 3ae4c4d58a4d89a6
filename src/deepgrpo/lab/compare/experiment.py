"""The experiment file: arms × seeds from one base recipe. plan.py turns it into runs. No torch.

    experiment.toml ─► Experiment

docs/compare.md has an example with every key.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from deepgrpo.config import DataConfig, SamplingConfig, Section, parse_section
from deepgrpo.config.base import PathText, Probability
from deepgrpo.config.files import parse_toml
from deepgrpo.config.shipped import recipe_dir
from deepgrpo.errors import ConfigError, did_you_mean
from deepgrpo.lab.compare.grid import Value, flatten


class FinalConfig(Section):
    """The final evaluation of finished runs, on untouched questions: never used for training or evaluation before."""

    data: DataConfig | None = None
    """The untouched questions; default, for generated data: eval.data with another seed. Questions that also occur in
    eval.data are left out and counted."""
    limit: PositiveInt = 1024
    """Number of questions answered greedily."""
    sampled_limit: PositiveInt = 256
    """Number of these questions, from the first, that are also sampled."""
    samples: Annotated[int, Field(ge=2)] = 64
    """Sampled responses per question."""
    k: tuple[PositiveInt, ...] = (1, 4, 16, 64)
    """pass@k for these k; each at most `samples`."""
    sampling: SamplingConfig | None = None
    """Sampling settings; default: the common recipe's [sampling], also for an arm that trains with different ones."""

    @model_validator(mode="after")
    def _enough_samples(self) -> FinalConfig:
        if self.k and max(self.k) > self.samples:
            raise ValueError(
                f"final.k has {max(self.k)}, but final.samples is {self.samples}: pass@k needs at least k samples; raise "
                "final.samples or drop that k"
            )
        return self


class CurveConfig(Section):
    """Summary of the learning curves, which are measured on eval.data during training."""

    last_share: Annotated[Probability, Field(gt=0)] = 0.2
    """Last part of the budget over which the "late" figure averages the curve: one evaluation alone is noisy."""
    target: Probability | None = None
    """Greedy accuracy for "tokens to reach"; absent: not reported."""


Seed = Annotated[int, Field(ge=0)]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.-]*")


class TuneConfig(Section):
    """Tuning before the comparison: every arm runs the same trials on seeds of their own, and its best trial is chosen."""

    grid: dict[str, tuple[Value, ...]]
    """Values to try by key, such as optim.lr = [1e-4, 3e-4]; with several keys, all combinations. A key that an arm sets
    itself is not tuned for that arm."""
    seeds: tuple[Seed, ...]
    """Seeds of the trials; none of `seeds`."""
    budget: PositiveInt
    """Sampled tokens per trial and seed."""
    metric: Literal["greedy", "sampled"] = "greedy"
    """Accuracy on eval.data to choose by: its mean over `last_share` of the budget and over the seeds."""
    last_share: Annotated[Probability, Field(gt=0)] = 0.2
    """The last part of the budget whose mean counts: one evaluation alone is noisy."""

    @field_validator("grid", mode="before")
    @classmethod
    def _by_dotted_key(cls, grid: Any) -> Any:
        return dict(flatten(grid)) if isinstance(grid, dict) else grid

    @field_validator("grid")
    @classmethod
    def _values_differ(cls, grid: dict[str, tuple[Value, ...]]) -> dict[str, tuple[Value, ...]]:
        if not grid:
            raise ValueError("tune.grid is empty: there is nothing to tune; add e.g. optim.lr = [1e-4, 3e-4]")
        for key, values in grid.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"tune.grid.{key} is {list(values)}; name at least one value, and each only once")
            for value in values:
                if isinstance(value, str) and not _NAME.fullmatch(value):
                    raise ValueError(
                        f"tune.grid.{key} has {value!r}; a value is also part of a directory's name: use letters, digits, "
                        "'-', '_', '+' and '.'"
                    )
        return grid

    @field_validator("seeds")
    @classmethod
    def _seeds_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds:
            raise ValueError("tune.seeds is empty, so no trial would run; name at least one seed (three say more)")
        if (twice := _twice(seeds)) is not None:
            raise ValueError(f"tune.seeds has {twice} twice, which repeats the same run; name every seed once")
        return seeds


def _twice(seeds: tuple[int, ...]) -> int | None:
    return min((seed for seed in seeds if seeds.count(seed) > 1), default=None)


class Experiment(Section):
    """A whole experiment file."""

    name: str
    """Directory of the experiment inside `dir`."""
    dir: PathText = "runs"
    """Directory that holds it."""
    seeds: tuple[Seed, ...] = (1, 2, 3, 4, 5)
    """Seeds; every arm is run on each. At least two."""
    baseline: str
    """Arm that all others are compared with."""
    budget: PositiveInt
    """Sampled tokens per run."""
    base: PathText
    """Recipe shared by all arms: a name (see `deepgrpo recipes`), or a path relative to here or to the experiment file."""
    common: dict[str, Any] = Field(default_factory=dict)
    """Changes to that recipe for all arms."""
    arms: dict[str, dict[str, Any]]
    """Changes to the recipe by arm. A table with another `type` replaces the recipe's table; any other is merged key by
    key."""
    shared_start: bool = False
    """Train one warm start, with the first of `seeds`, and begin every run from it; false: one per seed. Shared, it saves time,
    and intervals say nothing about other warm starts."""
    final: FinalConfig = FinalConfig()
    curve: CurveConfig = CurveConfig()
    tune: TuneConfig | None = None
    """Tuning of each arm before the comparison; absent: the arms run as they are written."""

    @field_validator("seeds")
    @classmethod
    def _paired(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if (twice := _twice(seeds)) is not None:
            raise ValueError(f"seeds has {twice} twice, which repeats the same run; name every seed once")
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
                    f"arms has {seen[arm.lower()]!r} and {arm!r}, which clash: they are one directory where file names ignore "
                    "case; rename one"
                )
            seen[arm.lower()] = arm
        if len(self.arms) < 2:
            raise ValueError(f"arms has {list(self.arms)} alone, and nothing to compare it with; add another [arms.NAME]")
        if self.baseline not in self.arms:
            hint = did_you_mean(self.baseline, self.arms, "the arms are")
            raise ValueError(f"baseline is {self.baseline!r}, which is not an arm; {hint}")
        return self

    @model_validator(mode="after")
    def _fresh_seeds(self) -> Experiment:
        if self.tune is not None and (both := sorted(set(self.seeds) & set(self.tune.seeds))):
            raise ValueError(
                f"tune.seeds and seeds both have {both[0]}: a choice made on a seed is biased there, so the comparison needs "
                "fresh ones; change one of the two lists"
            )
        return self


def find_experiment(name: str) -> Path:
    """The experiment file given by path, or by the name of a shipped experiment (`recipes/lab/`).

    Raises ConfigError with the nearest name if there is none.
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
    raise ConfigError(f"experiment {name!r} does not exist; {did_you_mean(path.stem, names, 'shipped experiments')}")


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment file. Raises ConfigError that names the key, the value and the remedy."""
    try:
        raw = parse_toml(path.read_bytes())
    except (OSError, ValueError) as error:
        said = str(error)
        # TOML's message for a repeated [arms.NAME]
        twice = "; are there two arms of the same name?" if "twice" in said or "overwrite" in said else ""
        raise ConfigError(f"experiment {str(path)!r} cannot be read: {said}{twice}") from None
    if "explore" in raw or "run" in raw:
        raise ConfigError(
            f"{str(path)!r} looks like a recipe, not like an experiment (it has {'[explore]' if 'explore' in raw else '[run]'}"
            "); an experiment names a base recipe and its [arms.NAME]: see docs/compare.md, or run it with deepgrpo train"
        )
    return parse_section(Experiment, raw, str(path))
