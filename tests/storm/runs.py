"""The small run of the storm, what it leaves behind, and whether two of them left the same."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import Starter

from recipes import CHAIN, HELD_OUT, recipe_text

RUN = Path("runs/storm")
RECIPE = recipe_text(
    CHAIN, run={"name": "storm", "steps": 4, "prompts_per_step": 4}, loss={"beta": 0.01},
    model={"hidden_size": 32, "num_layers": 1, "intermediate_size": 64},
    explore={"branches_per_pivot": 2, "segments": {"type": "tokens", "size": 2}},
    checkpoint={"every": 1, "keep_last": 1}, log={"trees_every": 1}, eval={"every": 2, "limit": 4, "data": HELD_OUT},
)  # fmt: skip
RESUMES = 4
"""A run that has not come to its end after so many resumes never will."""
PATIENCE_S = 120.0
"""Seconds after which a command counts as hung; the slowest takes two."""

_CLOCK = re.compile(r"time|seconds|tokens_per_s|memory|_mb$|pid|host")
_UNTOLD = re.compile(r"log\.txt|place\.json|.*lock.*|report\.html")
"""Files that differ between equal runs."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    hung: bool = False

    @property
    def fault(self) -> str | None:
        """A hang, a traceback or a crash; None for a success and for a sentence."""
        if self.hung:
            return "hang"
        if "Traceback (most recent call last)" in self.out + self.err:
            # Ctrl-C before the first line of the program is Python's to report
            early = "KeyboardInterrupt" in self.err and "deepgrpo/" not in self.err
            return None if early else "traceback"
        if self.code not in (0, 1, 2, 130):
            return f"exit code {self.code}"
        if self.code in (1, 2) and not self.sentence:
            return "no sentence"
        return None

    @property
    def sentence(self) -> str:
        """The error message; `compare` reports those of its runs."""
        found = re.search(r"^error: (.+)", self.err, re.MULTILINE) or re.search(r"failed: error: (.+)", self.out)
        return found.group(1) if found else ""


def run(starter: Starter, *arguments: str, cwd: Path, **environ: str) -> Ended:
    """Run a command to its end."""
    try:
        done = starter.run(*arguments, cwd=cwd, timeout=PATIENCE_S, **environ)
    except subprocess.TimeoutExpired:
        return Ended(-1, "", "", hung=True)
    return Ended(done.returncode, done.stdout, done.stderr)


def bring_to_end(starter: Starter, place: Path) -> tuple[list[str], str | None]:
    """Resume the run until it is done. Where that is refused, start it anew, as the refusal says.

    Returns (sentences of the refusals, fault).
    """
    sentences: list[str] = []
    for _ in range(RESUMES):
        ended = run(starter, "train", "--resume", str(RUN), cwd=place)
        if ended.code == 0 or ended.fault:
            return sentences, ended.fault
        sentences.append(ended.sentence)
        ended = run(starter, "train", "storm.toml", cwd=place)
        if ended.code == 2 and not ended.fault:  # the directory is in the way
            shutil.rmtree(place / RUN)
            ended = run(starter, "train", "storm.toml", cwd=place)
        if ended.code == 0 or ended.fault:
            return sentences, ended.fault
    return sentences, "it never ends"


def new_place(folder: Path, name: str) -> Path:
    """An empty working directory with the recipe."""
    place = folder / re.sub(r"\W+", "-", name)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "storm.toml").write_text(RECIPE)
    return place


def contents(directory: Path) -> dict[str, str]:
    """Digest of each file of a run, by its path; without what a clock measured."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_dir():
            if not any(path.iterdir()) and not _UNTOLD.fullmatch(path.name):
                found[f"{name}/"] = "empty"
        elif not _UNTOLD.fullmatch(path.name):
            found[name] = hashlib.sha256(_timeless(path)).hexdigest()[:16]
    return found


def _timeless(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.name.endswith(".gz"):
        raw = gzip.decompress(raw)
    if path.suffix not in (".json", ".jsonl"):
        return raw
    values = [json.loads(line) for line in ([raw] if path.suffix == ".json" else raw.splitlines())]
    for value in values:
        if isinstance(value, dict):
            value.pop("crc32", None)  # of the rest, which has times in it
    return json.dumps([_without_clock(value) for value in values], sort_keys=True).encode()


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clock(each) for key, each in value.items() if not _CLOCK.search(key)}
    return [_without_clock(each) for each in value] if isinstance(value, list) else value


def differences(directory: Path, expected: dict[str, str]) -> list[str]:
    """What a run has more, less or otherwise than expected; empty if it is the same."""
    found = contents(directory)
    return [
        f"{'surplus' if name not in expected else 'missing' if name not in found else 'other'} {name}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
