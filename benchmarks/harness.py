"""Time the parts of a step side by side: our way, the reference's way, and other installed libraries.

All arms run in turn within one process, `repeats` times, so that a change in the machine's speed affects all of them. The
report has medians, ranges and ratios to a baseline. The figure to trust is the ratio.

The arms are in `suites/`, other libraries in `baselines/`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from benchmarks.arms import Arm, BenchSetting, LeftOutError, Offer, Suite
from benchmarks.options import BenchOptions
from benchmarks.suites import SUITES, SuiteName
from benchmarks.workloads import WORKLOADS, WorkloadName
from deepgrpo.errors import ConfigError
from deepgrpo.lab.machine import machine_and_versions
from deepgrpo.terminal import print_columns


@dataclass(slots=True)
class Timing:
    """Seconds and memory of an arm."""

    name: str
    seconds: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    """Peak resident memory during the run, above that before; None where the system does not report it."""
    tokens: int = 0
    note: str = ""

    def row(self) -> dict[str, Any]:
        return {
            "name": self.name, "median_s": statistics.median(self.seconds), "min_s": min(self.seconds),
            "max_s": max(self.seconds), "peak_mb": self.peak_mb, "tokens": self.tokens, "note": self.note,
        }  # fmt: skip


def run_bench(options: BenchOptions, console: Console | None = None) -> int:
    """Run one benchmark, print its table, and write JSON if asked. Returns the exit code."""
    out = console or Console(highlight=False)
    if not out.is_terminal:
        out = Console(file=out.file, highlight=False, width=160)  # a table in a file should not be folded
    if options.repeats < 1:
        raise ConfigError(f"--repeats is {options.repeats}, but something has to be measured; set it to 1 or more")
    torch.set_num_threads(options.threads)
    with ExitStack() as closing:
        setting = BenchSetting(
            WORKLOADS[options.workload], options.budget, options.threads, closing, options.vllm_python, options.warmup
        )
        assert options.part != "busy"  # benchmarks/busy.py runs it
        suite = SUITES[options.part](setting)
        arms = _make(_chosen(suite, options.arms), out)
        torch.set_num_threads(options.threads)  # other libraries may have changed it
        # no bar: it would draw beside what is timed
        measured = measure(arms, options.repeats, options.warmup, out.print)
        for arm, each in zip(arms, measured, strict=True):
            if options.memory:
                each.peak_mb = arm.peak_mb() if arm.peak_mb else peak_in_child(options, arm.name)
        result = report(options, suite, arms, measured)
    _show(out, options, result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(
    arms: Sequence[Arm], repeats: int, warmup: int = 1, say: Callable[[str], None] = lambda text: None
) -> list[Timing]:
    """Time the arms in turn, after warm-up rounds.

    Args:
        say: called with a line after each round.
    """
    found = {arm.name: Timing(arm.name, note=arm.note) for arm in arms}
    began, rounds = time.monotonic(), warmup + repeats
    for turn in range(rounds):
        for arm in arms:
            done = arm.timed()
            found[arm.name].tokens = done.tokens
            if turn >= warmup:
                found[arm.name].seconds.append(done.seconds)
        warms = ", which warmed up" if turn < warmup else ""
        say(f"round {turn + 1} of {rounds}{warms}: done after {time.monotonic() - began:.0f} s")
    return list(found.values())


def peak_of(arm: Arm) -> float | None:
    """Highest resident memory while an arm runs for the first time in this process, above that before, in MiB.

    None where the system cannot forget an earlier peak: that takes Linux. psutil knows no peak, so it is read from /proc.
    """
    before: int = psutil.Process().memory_info().rss
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return None
    arm.run()
    lines = Path("/proc/self/status").read_text().splitlines()
    peak_kb = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return float(round(peak_kb / 2**10 - before / 2**20, 1))


def report(options: BenchOptions, suite: Suite, arms: Sequence[Arm], measured: Sequence[Timing]) -> dict[str, Any]:
    """Arms, ratios to the baseline and within pairs, machine and versions, as plain JSON.

    `ratios`: seconds of the baseline over those of the arm. `pairs` ("ours/other"): seconds of the other over ours.
    """
    rows = [each.row() for each in measured]
    medians = {row["name"]: row["median_s"] for row in rows}
    baseline = suite.baseline
    like = {name: s for name, s in medians.items() if name not in suite.apart}
    ratios = {name: medians[baseline] / s for name, s in like.items()} if baseline in medians else {}
    pairs = {f"{a}/{b}": medians[b] / medians[a] for a, b in suite.pairs if a in medians and b in medians}
    extra = suite.extra()
    if "cost_model" in extra and "tree" in ratios:
        extra["cost_model"]["fraction"] = ratios["tree"] / extra["cost_model"]["predicted_ratio"]
    here = machine_and_versions()
    for arm in arms:
        here["versions"] |= arm.versions
    return {
        "part": options.part, "workload": asdict(WORKLOADS[options.workload]), "baseline": baseline,
        "repeats": options.repeats, "warmup": options.warmup, "threads": torch.get_num_threads(), "arms": rows,
        "ratios": ratios, "pairs": pairs, **extra, **here,
    }  # fmt: skip


# ---------------------------------------------------------------- arms


def _chosen(suite: Suite, names: Sequence[str]) -> list[Offer]:
    known = [offer.name for offer in suite.offers]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(f"--arms {unknown[0]!r} is not one of {', '.join(known)}")
    return [offer for offer in suite.offers if (offer.name in names if names else offer.default)]


def _make(offers: Sequence[Offer], out: Console) -> list[Arm]:
    """Make the available arms; print a line for each of the others."""
    arms: list[Arm] = []
    for offer in offers:
        try:
            arms.append(offer.make())
        except LeftOutError as why:
            out.print(f"arm {offer.name} left out: {why}", markup=False)
    if not arms:
        raise ConfigError(f"no arm is left of {', '.join(offer.name for offer in offers)}; the lines above say why")
    return arms


def peak_in_child(options: BenchOptions, arm: str) -> float | None:
    """Peak of an arm in a process of its own, as the allocator would reuse memory that another arm has freed."""
    command = [
        sys.executable, "-m", "benchmarks.harness", options.part, options.workload, str(options.threads),
        str(options.budget), arm,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    last = done.stdout.strip().rpartition("\n")[2]
    return float(last) if done.returncode == 0 and last not in ("", "None") else None


def _main(part: SuiteName, workload: WorkloadName, threads: str, budget: str, name: str) -> None:
    """Run one arm once and print its peak; the child process of `peak_in_child`."""
    torch.set_num_threads(int(threads))
    with ExitStack() as closing:
        suite = SUITES[part](BenchSetting(WORKLOADS[workload], int(budget), int(threads), closing))
        peak = peak_of(_chosen(suite, [name])[0].make())
    print(peak)


# ---------------------------------------------------------------- what is shown


def _show(out: Console, options: BenchOptions, result: dict[str, Any]) -> None:
    columns = ("arm", "median s", "range", f"× {result['baseline']}", "peak MB", "tokens", "remark")
    rows = []
    for row in result["arms"]:
        ratio = result["ratios"].get(row["name"])
        rows.append((
            row["name"], f"{row['median_s']:.2f}", f"{row['min_s']:.2f}–{row['max_s']:.2f}",
            "" if ratio is None else f"{ratio:.2f}", "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
            f"{row['tokens']:,}", row["note"],
        ))  # fmt: skip
    title = f"{options.part}, workload {options.workload}, {result['threads']} threads"
    print_columns(out, columns, rows, title=title, left=(0, 6))
    for pair, ratio in result["pairs"].items():
        ours, other = pair.split("/")
        out.print(f"{ours} against {other}: {ratio:.2f}×")
    if "cost_model" in result:
        model = result["cost_model"]
        fraction = f"; tree has {model['fraction']:.0%} of that" if "fraction" in model else ""
        out.print(
            f"cost model: {model['path_tokens']:,} tokens on paths, {model['unique_tokens']:,} unique (ratio "
            f"{model['token_ratio']:.2f}), {model['terms']:,} trained: expect {model['predicted_ratio']:.2f}{fraction}"
        )
    out.print(f"{result['machine']['processor']}, load {result['machine']['load']:.1f}, torch {result['versions']['torch']}")


if __name__ == "__main__":
    _main(*sys.argv[1:])  # type: ignore[arg-type]
