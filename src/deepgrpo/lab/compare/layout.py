"""Names of everything in an experiment's directory; each is spelled here and nowhere else.

    EXPERIMENT/experiment.toml                  copy of the experiment file
    EXPERIMENT/jobs/NAME.toml, NAME.log         recipe and output of every job
    EXPERIMENT/warmstart/seed-1/                a run without steps; its start/ is shared by all runs of the seed
    EXPERIMENT/tune/deep/lr=0.0001/seed-101/    a trial of the tuning stage: an ordinary run
    EXPERIMENT/tune.json, tune.md               figures of the trials, and the choice of each arm
    EXPERIMENT/arms/deep/seed-1/                a fresh run: an ordinary run, with final.json
    EXPERIMENT/comparison.json, .md, .png       the results: every figure of every run with its curve, tables, picture
    EXPERIMENT/figures.json                     figures of the tables in rows, one per arm and metric
    EXPERIMENT/.lock                            held while `deepgrpo compare` runs there
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ExperimentDir:
    """Paths inside an experiment's directory; nothing is read or created.

    Example: ExperimentDir(Path("runs/methods")).arm("deep") is runs/methods/arms/deep, which holds seed-1, seed-2, ...
    """

    path: Path

    @property
    def experiment(self) -> Path:
        return self.path / "experiment.toml"

    @property
    def jobs(self) -> Path:
        return self.path / "jobs"

    def recipe(self, job: str) -> Path:
        return self.jobs / f"{job}.toml"

    def job_log(self, job: str) -> Path:
        return self.jobs / f"{job}.log"

    @property
    def final_setup(self) -> Path:
        """The final evaluation, as the processes that make it read it."""
        return self.jobs / "final-setup.json"

    @property
    def warmstarts(self) -> Path:
        return self.path / "warmstart"

    def arm(self, arm: str) -> Path:
        return self.path / "arms" / arm

    def trial(self, arm: str, trial: str) -> Path:
        return self.path / "tune" / arm / trial

    @property
    def tuning(self) -> Path:
        return self.path / "tune.json"

    @property
    def tuning_page(self) -> Path:
        return self.path / "tune.md"

    @property
    def comparison(self) -> Path:
        return self.path / "comparison.json"

    @property
    def figures(self) -> Path:
        return self.path / "figures.json"

    @property
    def page(self) -> Path:
        return self.path / "comparison.md"

    @property
    def picture(self) -> Path:
        return self.path / "comparison.png"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"


def seed_name(seed: int) -> str:
    """`seed-1` for seed 1."""
    return f"seed-{seed}"
