"""Races: several commands at once on one run directory. One of them trains; the others end in a sentence."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from storm.runs import PATIENCE_S, RUN, Ended, bring_to_end, contents, differences, new_place, run
from storm.starter import Starter

TRAIN, RESUME = ("train", "storm.toml"), ("train", "--resume", str(RUN))
RACES: dict[str, tuple[bool, tuple[tuple[str, ...], ...]]] = {
    "two starts": (False, (TRAIN, TRAIN)),
    "four starts": (False, (TRAIN, TRAIN, TRAIN, TRAIN)),
    "two resumes": (True, (RESUME, RESUME)),
    "a start and a resume": (False, (TRAIN, RESUME)),
    "a resume and a start": (True, (RESUME, TRAIN)),
}
"""Name → (the run was stopped half-way before, commands)."""


def run_races(
    starter: Starter, folder: Path, repeats: int, done: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, facts) of each race that is not done."""
    place = new_place(folder, "race-alone")
    began = time.monotonic()
    assert run(starter, *TRAIN, cwd=place).code == 0
    seconds = time.monotonic() - began
    expected = contents(place / RUN)
    for name, (half, arguments) in RACES.items():
        for number in range(repeats):
            title = f"{name} {number}"
            if title in done:
                continue
            yield (
                title,
                _race(starter, new_place(folder, f"race-{title}"), half, arguments, seconds, expected, 0.1 * number),
            )


def _race(
    starter: Starter, place: Path, half: bool, arguments: tuple[tuple[str, ...], ...], seconds: float,
    expected: dict[str, str], apart: float,
) -> dict[str, Any]:  # fmt: skip
    """Let the commands race, `apart` seconds after one another; a last resume brings to its end what none of them did."""
    if half:
        command = starter.start(*TRAIN, cwd=place)
        time.sleep(0.7 * seconds)
        command.send_signal(signal.SIGTERM)
        command.communicate(PATIENCE_S)
    racing = []
    for each in arguments:
        racing.append(starter.start(*each, cwd=place))
        time.sleep(apart)
    ends = []
    for command in racing:
        try:
            out, err = command.communicate(PATIENCE_S)
            ends.append(Ended(command.wait(), out, err))
        except subprocess.TimeoutExpired:
            ends.append(Ended(-1, "", "", hung=True))
    fault = next((each.fault for each in ends if each.fault), None)
    if not fault and not any(each.code == 0 for each in ends):
        _, fault = bring_to_end(starter, place)
    left = [] if fault else differences(place / RUN, expected)
    if not fault and not left:
        shutil.rmtree(place)
    return {
        "codes": [each.code for each in ends], "sentences": [each.sentence for each in ends if each.code], "fault": fault,
        "differences": left,
    }  # fmt: skip
