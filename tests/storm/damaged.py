"""Damaged run directories: every damage of `damage.py` times the commands that read a run."""

from __future__ import annotations

import random
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import damage
from deepgrpo.runs.checkpoints import newest_checkpoint
from deepgrpo.runs.layout import RunDir
from storm.runs import contents, run
from storm.starter import Starter

RUN = Path("runs/run")
COMPARE = ("compare", "pair.toml")
ARM = Path("runs/pair/arms/a/seed-1")
EXPERIMENT = """
name = "pair"
dir = "runs"
budget = 700
seeds = [1, 2]
baseline = "a"
base = "recipe.toml"
[arms.a]
[arms.b]
optim = {lr = 2e-3}
[final]
limit = 4
sampled_limit = 2
samples = 2
k = [1, 2]
"""
COMPARE_EVERY = 6
"""`compare` takes longer than the other commands: every so many damages."""
OTHERS = 2
"""Commands besides --resume for each damage, in turn; all of them with `everything`."""
SMALL = 0.05
"""Share of the damages up to which `compare`, which takes four runs to prepare, is left out."""


def run_damages(
    starter: Starter, folder: Path, *, everything: bool = False, share: float = 1.0, seed: int = 0,
    done: Collection[str] = (),
) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
    """Yield (damage · command, facts).

    Args:
        everything: every command for every damage.
        share: of the damages, drawn by the seed.
        done: names that are left out.
    """
    compares = everything or share > SMALL
    trial = _Trial(starter, folder, compares=compares)
    others = [name for name in damage.COMMANDS if name not in ("resume", "compare")]
    draw = random.Random(seed)
    for number, (name, hurt) in enumerate(damage.damages()):
        if draw.random() >= share:
            continue
        chosen = others if everything else [others[(OTHERS * number + i) % len(others)] for i in range(OTHERS)]
        if compares and (everything or number % COMPARE_EVERY == 0):
            chosen = [*chosen, "compare"]
        for command in ["resume", *chosen]:
            title = f"{name} · {command}"
            if title not in done:
                yield title, trial.run(name, hurt, command)


class _Trial:
    """A whole run, a whole comparison, and copies of them that are damaged and read."""

    def __init__(self, starter: Starter, folder: Path, *, compares: bool) -> None:
        self.starter = starter
        self.whole, self.pair = _new(folder / "damage-whole"), _new(folder / "damage-pair")
        self.place = folder / "damaged"
        damage.build(self.whole)
        if compares:
            (self.pair / "recipe.toml").write_text(damage.RECIPE)
            (self.pair / "pair.toml").write_text(EXPERIMENT)
            ended = run(starter, *COMPARE, cwd=self.pair)
            assert ended.code == 0, ended.err
        _copy(self.whole, self.place)
        assert run(starter, *_arguments("resume"), cwd=self.place).code == 0
        self.expected = _result(self.place / RUN)

    def run(self, name: str, hurt: damage.Damage, command: str) -> dict[str, Any]:
        """Damage a copy and run a command on it."""
        compare = command == "compare"
        _copy(self.pair if compare else self.whole, self.place)
        try:
            hurt(self.place / (ARM if compare else RUN))
        except FileNotFoundError:
            assert compare  # a run of a comparison may lack what would be damaged
            return {"command": command, "code": 0, "sentence": "", "fault": None, "other_result": False}
        ended = run(self.starter, *_arguments(command), cwd=self.place)
        # a changed recipe is a wish, as if it had been changed on the command line
        asked_same = command == "resume" and not name.startswith("config: ")
        return {
            "command": command, "code": ended.code, "sentence": ended.sentence, "fault": ended.fault,
            "other_result": asked_same and ended.code == 0 and _result(self.place / RUN) != self.expected,
            **({"output": (ended.out + ended.err)[-2000:]} if ended.fault else {}),
        }  # fmt: skip


def _new(place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return place


def _arguments(command: str) -> tuple[str, ...]:
    if command == "compare":
        return COMPARE
    return tuple(str(RUN) if each == "RUN" else each for each in damage.COMMANDS[command])


def _result(directory: Path) -> dict[str, str]:
    """Weights, moments and state at the end."""
    newest = newest_checkpoint(RunDir(directory))
    return {} if newest is None else contents(newest.path)


def _copy(whole: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place, symlinks=True)
