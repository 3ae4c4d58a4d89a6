"""Damaged run directories: every damage of `damage.py` times the commands that read a run."""

from __future__ import annotations

import random
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import damage
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
    starter: Starter,
    folder: Path,
    *,
    everything: bool = False,
    share: float = 1.0,
    seed: int = 0,
    done: Collection[str] = (),
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (damage: command, facts).

    Args:
        everything: every command for every damage.
        share: of the damages, drawn by the seed.
        done: names that are left out.
    """
    whole = folder / "damage-whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir(parents=True)
    (whole / "recipe.toml").write_text(damage.RECIPE)
    assert run(starter, "train", "recipe.toml", cwd=whole).code == 0
    pair = folder / "damage-pair"
    shutil.rmtree(pair, ignore_errors=True)
    pair.mkdir()
    (pair / "recipe.toml").write_text(damage.RECIPE)
    (pair / "pair.toml").write_text(EXPERIMENT)
    compares = everything or share > SMALL
    if compares:
        ended = run(starter, *COMPARE, cwd=pair)
        assert ended.code == 0, ended.err
    asked = dict(damage.COMMANDS)
    others = [name for name in asked if name != "resume"]
    reference = _result(starter, whole, folder / "damage-reference", asked["resume"])
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
                yield (
                    title,
                    _try(
                        starter,
                        pair if command == "compare" else whole,
                        folder / "damaged",
                        hurt,
                        command,
                        asked,
                        reference,
                    ),
                )


def _try(
    starter: Starter, whole: Path, place: Path, hurt: damage.Damage, command: str, asked: Any, reference: dict[str, str]
) -> dict[str, Any]:
    _copy(whole, place)
    target = ARM if command == "compare" else RUN
    try:
        hurt(place / target)
    except FileNotFoundError:  # a run of a comparison lacks what it would damage
        return {"command": command, "code": 0, "sentence": "", "fault": None, "other_result": False}
    arguments = (
        COMPARE if command == "compare" else tuple(str(target) if each == "RUN" else each for each in asked[command])
    )
    ended = run(starter, *arguments, cwd=place)
    other = command == "resume" and ended.code == 0 and _of(place / RUN) != reference
    return {
        "command": command, "code": ended.code, "sentence": ended.sentence, "fault": ended.fault, "other_result": other,
        **({"output": (ended.out + ended.err)[-2000:]} if ended.fault else {}),
    }  # fmt: skip


def _result(starter: Starter, whole: Path, place: Path, arguments: tuple[str, ...]) -> dict[str, str]:
    _copy(whole, place)
    assert run(starter, *(str(RUN) if each == "RUN" else each for each in arguments), cwd=place).code == 0
    return _of(place / RUN)


def _of(directory: Path) -> dict[str, str]:
    """Weights, moments and state at the end."""
    newest = max((directory / "checkpoints").glob("step-*"), default=None)
    return {} if newest is None else contents(newest)


def _copy(whole: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place, symlinks=True)
