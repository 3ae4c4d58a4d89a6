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
OTHERS = 2
"""Commands besides --resume for each damage, in turn; all of them with `everything`."""


def run_damages(
    starter: Starter, folder: Path, *, everything: bool = False, share: float = 1.0, seed: int = 0,
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
    damage.build(whole)
    asked = dict(damage.COMMANDS)
    others = [name for name in asked if name != "resume"]
    reference = _result(starter, whole, folder / "damage-reference", asked["resume"])
    draw = random.Random(seed)
    for number, (name, hurt) in enumerate(damage.damages()):
        if draw.random() >= share:
            continue
        chosen = others if everything else [others[(OTHERS * number + i) % len(others)] for i in range(OTHERS)]
        for command in ["resume", *chosen]:
            title = f"{name} · {command}"
            if title not in done:
                yield title, _try(starter, whole, folder / "damaged", hurt, command, asked, reference)


def _try(
    starter: Starter, whole: Path, place: Path, hurt: damage.Damage, command: str, asked: Any, reference: dict[str, str]
) -> dict[str, Any]:
    _copy(whole, place)
    hurt(place / RUN)
    if command == "compare":  # in this process, where its jobs are not started
        found = damage.outcome(command, place / RUN)
        return {
            "command": command, "code": found.code, "sentence": found.sentence, "fault": found.fault,
            "other_result": False, **({"output": found.said[-2000:]} if found.fault else {}),
        }  # fmt: skip
    ended = run(starter, *(str(RUN) if each == "RUN" else each for each in asked[command]), cwd=place)
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
    newest = newest_checkpoint(RunDir(directory))
    return {} if newest is None else contents(newest.path)


def _copy(whole: Path, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place, symlinks=True)
