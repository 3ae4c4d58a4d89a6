"""Whole runs with the hostile rewards, each in a process of its own: counts of hangs, crashes and tracebacks.

    from hostile.rewards import run_hostile_rewards
    counts = run_hostile_rewards()        # Counts(runs=150, hangs=0, crashes=0, tracebacks=0, wrong=())
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from commands import Starter, shared_process

from hostile.reward_cases import CASES, Case

RECIPE = """
[run]
name = "hostile"
steps = 2
prompts_per_step = 2
device = "cpu"
threads = 1

[model]
type = "scratch"
hidden_size = 16
num_layers = 1
num_heads = 2
intermediate_size = 32
max_position = 48

[data]
type = "synthetic"
chain_length = 1

[reward]
type = "user"
truncated_value = "none"

[sampling]
max_new_tokens = 4

[explore]
type = "root"
num_rollouts = 3

[checkpoint]
every = 1
"""
PATIENCE_S = 120.0
"""Seconds after which a run counts as hanging."""


@dataclass(frozen=True)
class Counts:
    runs: int
    hangs: int
    crashes: int
    """Runs that ended with another exit code than expected: 0, 1 or 2, or what the reward itself asked for."""
    tracebacks: int
    wrong: tuple[str, ...] = ()
    """What went wrong, a line each; also runs without the sentence that they should have ended in."""


@dataclass(frozen=True)
class Outcome:
    fault: str | None
    """"hang", "crash", "traceback" or "sentence"; None: as expected."""
    code: int | None
    out: str
    err: str


def run_hostile_rewards(cases: Sequence[Case] = CASES, starter: Starter | None = None) -> Counts:
    """Train with each reward for two steps."""
    faults: dict[str, list[str]] = {"hang": [], "crash": [], "traceback": [], "sentence": []}
    with nullcontext() if starter else shared_process():
        own = starter or Starter()
        for case in cases:
            with tempfile.TemporaryDirectory(prefix="deepgrpo-hostile-") as folder:
                found = train_with(case, Path(folder), own)
            if found.fault:
                faults[found.fault].append(f"{case.name}: {found.fault} (exit code {found.code}) {found.err[-300:]!r}")
    wrong = tuple(line for lines in faults.values() for line in lines)
    return Counts(len(cases), len(faults["hang"]), len(faults["crash"]), len(faults["traceback"]), wrong)


def train_with(case: Case, folder: Path, starter: Starter) -> Outcome:
    """One run with a reward, in a folder that it may fill."""
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / case.reference.partition(":")[0]).write_text(case.source)
    process = starter.start(
        "train", "recipe.toml", "--reward.function", case.reference, "--reward.timeout_s", str(case.timeout_s), cwd=folder
    )
    with ThreadPoolExecutor(2) as readers:  # a pipe holds 64 KB
        said = [readers.submit(_read, stream) for stream in (process.stdout, process.stderr)]
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            return Outcome("hang", None, "", "")
        finally:
            # the witness has said what it has to say when its process has ended; then what a reward left behind ends, too
            wait(said, timeout=3)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        out, err = (each.result() for each in said)
    code = process.wait()
    return Outcome(_fault(case, code, err), code, out, err)


def _read(stream: Any) -> str:
    stream.reconfigure(errors="replace")
    with stream:
        return str(stream.read())


def _fault(case: Case, code: int, err: str) -> str | None:
    lines = err.splitlines()
    # Python itself shows what a user's exit handler raises
    if any(x.startswith("Traceback") and not y.startswith("Exception ignored in") for y, x in pairwise(["", *lines])):
        return "traceback"
    expected = (case.code,) if case.code is not None else (1, 2) if case.says else (0,)
    if code not in expected:
        return "crash"
    return "sentence" if case.says and not re.search(case.says, err) else None
