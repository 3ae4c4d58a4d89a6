"""Kills: a run is ended at a file operation or at a moment, resumed until it is done, and compared with an undisturbed one."""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from storm.runs import PATIENCE_S, RUN, Ended, bring_to_end, contents, differences, new_place, run
from storm.starter import Starter

WAYS = ("operation", "moment", "SIGTERM", "SIGINT", "SIGINT twice", "while resuming")


@dataclass(frozen=True)
class Kill:
    """One kill: of the first command, or of the resume after a kill at half time."""

    number: int
    way: str
    share: float
    """Of the run's operations, or of its time."""

    @property
    def name(self) -> str:
        return f"{self.number:03d} {self.way}"


def kills(count: int, seed: int = 0) -> list[Kill]:
    """Half of the kills at file operations, spread evenly with a random start; the rest at moments, the ways in turn."""
    draw = random.Random(seed)
    half = count // 2
    first = [Kill(i, "operation", (i + draw.random()) / half) for i in range(half)]
    return first + [Kill(i, WAYS[1:][i % (len(WAYS) - 1)], draw.random()) for i in range(half, count)]


class Storm:
    """The undisturbed run, and what a killed one has to be equal to."""

    def __init__(self, starter: Starter, folder: Path) -> None:
        self.starter, self.folder = starter, folder
        place = new_place(folder, "undisturbed")
        listed = place / "operations"
        done = run(starter, "train", "storm.toml", cwd=place, STORM_LIST=str(listed))
        assert done.code == 0, done.err
        self.operations = listed.read_text().splitlines()
        self.expected = contents(place / RUN)
        again = new_place(folder, "again")
        began = time.monotonic()
        run(starter, "train", "storm.toml", cwd=again)
        self.seconds = time.monotonic() - began
        assert differences(again / RUN, self.expected) == [], "the run itself is not reproducible"

    def kill(self, kill: Kill) -> dict[str, Any]:
        """Kill, resume, compare. Returns the facts as JSON."""
        place = new_place(self.folder, kill.name)
        where, first = self._strike(kill, place)
        phase = _phase(place / RUN)
        fault = first.fault if first else None
        sentences: list[str] = []
        if not fault:
            sentences, fault = bring_to_end(self.starter, place)
        left = [] if fault else differences(place / RUN, self.expected)
        if not fault and not left:
            shutil.rmtree(place)
        return {
            **asdict(kill),
            "where": where,
            "phase": phase,
            "sentences": sentences,
            "fault": fault,
            "differences": left,
            **({"output": (first.out + first.err)[-2000:]} if first and first.fault else {}),
        }

    def _strike(self, kill: Kill, place: Path) -> tuple[str, Ended | None]:
        """Start a command and end it; returns where, and how it ended if it could still say so."""
        if kill.way == "operation":
            number = 1 + int(kill.share * len(self.operations))
            run(self.starter, "train", "storm.toml", cwd=place, STORM_KILL_AT=str(number))
            return self.operations[number - 1], None
        if kill.way == "while resuming":
            self._signals(place, ("train", "storm.toml"), 0.6 * self.seconds, [signal.SIGKILL])
            arguments: tuple[str, ...] = ("train", "--resume", str(RUN))
        else:
            arguments = ("train", "storm.toml")
        wait = kill.share * self.seconds
        sent = {
            "SIGTERM": [signal.SIGTERM], "SIGINT": [signal.SIGINT], "SIGINT twice": [signal.SIGINT, signal.SIGINT]
        }.get(kill.way, [signal.SIGKILL])  # fmt: skip
        ended = self._signals(place, arguments, wait, sent)
        return f"after {wait:.2f} s", ended if signal.SIGKILL not in sent else None

    def _signals(self, place: Path, arguments: Sequence[str], wait: float, sent: Sequence[signal.Signals]) -> Ended:
        command = self.starter.start(*arguments, cwd=place)
        time.sleep(wait)
        for number in sent:
            command.send_signal(number)
            time.sleep(0.02)
        try:
            out, err = command.communicate(PATIENCE_S)
        except subprocess.TimeoutExpired:
            return Ended(-1, "", "", hung=True)
        code = command.wait()
        # a signal may come before the program has a handler, which is its right
        return Ended(130 if code == -signal.SIGINT or code == -signal.SIGTERM else code, out, err)


def _phase(directory: Path) -> str:
    """How far a killed run came, by its files."""
    if not (directory / "start").is_dir():
        return "before the end of the warm start"
    if not any((directory / "checkpoints").glob("step-*")):
        return "before the first checkpoint"
    if any(re.match(r"\.(tmp|old)-", path.name) for path in (directory / "checkpoints").iterdir()):
        return "while saving or deleting a checkpoint"
    return "between checkpoints"


def run_kills(
    starter: Starter, folder: Path, count: int, seed: int = 0, done: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, facts) of each kill that is not done."""
    storm = Storm(starter, folder)
    for each in kills(count, seed):
        if each.name not in done:
            yield each.name, storm.kill(each)
