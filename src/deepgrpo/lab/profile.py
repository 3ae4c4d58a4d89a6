"""Profile of a training step: seconds of each phase and their bounds.

A few steps are timed undisturbed. One more runs under torch's profiler, which attributes sampling and learning to kinds of
operators; time outside all operators is Python and dispatch. The speed of matrix products is compared with this machine's speed
on a large square product and on a copy: the larger share names their bound. On a GPU the seconds of an operator are those of
its kernels, and the rest is time in which the GPU waits.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from deepgrpo.config import Config, load_recipe, shipped
from deepgrpo.lab.machine import machine_and_versions
from deepgrpo.lab.options import ProfileOptions
from deepgrpo.runs.checkpoints import TrainState
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.moved import load_run_recipe
from deepgrpo.terminal import Terminal, print_columns
from deepgrpo.train.log import opening
from deepgrpo.train.loop import train_step
from deepgrpo.train.setup import Run, open_run

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_")
PACKED = "mkldnn::_linear_pointwise"
"""A product with a weight in blocks; its second input has the shape of a linear layer's weight."""
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("matrix products", (*PRODUCTS, PACKED)),
    ("attention", ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention")),
    ("softmax and draw", ("aten::_softmax", "aten::_log_softmax", "aten::cumsum", "aten::searchsorted", "aten::logsumexp",
                          "aten::argmax", "aten::sort")),
    ("optimizer", ("aten::_fused_adam", "aten::_foreach", "Optimizer.step")),
    ("copies and indexing", ("aten::copy_", "aten::cat", "aten::index", "aten::_index_put", "aten::gather", "aten::fill_",
                             "aten::zero_", "aten::scatter", "aten::embedding", "mkldnn::_reorder")),
)  # fmt: skip
OTHER, PYTHON = "other operators", "Python and dispatch"


@dataclass(slots=True)
class PhaseProfile:
    """One phase of the profiled step."""

    wall_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds by kind of operator."""
    operations: float = 0.0
    """Floating point operations of the matrix products."""
    bytes: float = 0.0
    """Memory traffic of the matrix products, if nothing stays in a cache between them."""

    def add(self, averages: Iterable[Any], width: int, *, gpu: bool = False) -> None:
        """Add the profiler's events, grouped by shape.

        Args:
            width: bytes of a number.
            gpu: count the time of kernels, each with the operator that launched it.
        """
        for each in averages:
            if each.device_type != DeviceType.CPU:
                continue  # a kernel by itself
            self.seconds[kind_of(each.key)] += (each.self_device_time_total if gpu else each.self_cpu_time_total) / 1e6
            if each.key in PRODUCTS:
                shapes = [s for s in each.input_shapes if s]
            elif each.key == PACKED:
                given, (columns, inner) = each.input_shapes[:2]
                shapes = [[math.prod(given[:-1]), inner], [inner, columns]]
            else:
                continue
            operations, numbers = product_cost(shapes)
            self.operations += operations * each.count
            self.bytes += numbers * width * each.count

    def shares(self) -> dict[str, float]:
        """Kind → share of the phase, Python included; sums to 1."""
        known = sum(self.seconds.values())
        whole = max(self.wall_s, known)
        return {kind: s / whole for kind, s in self.seconds.items()} | {PYTHON: max(0.0, whole - known) / whole}

    def summary(self, peak: Peak, dtype: str) -> dict[str, Any]:
        """Shares by kind and the speed of matrix products, as plain JSON."""
        seconds = self.seconds.get("matrix products", 0.0)
        operations, traffic = (self.operations / seconds, self.bytes / seconds) if seconds else (0.0, 0.0)
        return {
            "dtype": dtype,
            "shares": self.shares(),
            "products": {
                "gflop_per_s": operations / 1e9, "share_of_peak": operations / peak.operations_per_s,
                "gb_per_s": traffic / 1e9, "share_of_bandwidth": traffic / peak.bytes_per_s,
            },
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Peak:
    """Highest speed of this machine on one kind of number."""

    operations_per_s: float
    bytes_per_s: float


def run_profile(options: ProfileOptions, overrides: list[tuple[str, str]]) -> int:
    """Profile a recipe, or a run from its newest checkpoint; the run directory stays as it is. Returns the exit code."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own chatter
    config, resume = _config_of(options.what, overrides)
    with opening():
        run = open_run(config, resume)
        try:
            state = run.restore() if resume else run.begin()
            result = profile_steps(run, state, options.steps)
        finally:
            run.close()
    result |= {"what": config.run.name, **machine_and_versions()}
    out = Terminal()
    show(out, result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _config_of(what: str, overrides: list[tuple[str, str]]) -> tuple[Config, Path | None]:
    """Load the recipe and switch off evaluations and saved trees, which are no part of a step."""
    stored = RunDir(Path(what))
    resume = stored.path if stored.has_recipe() else None
    config = load_run_recipe(stored, overrides) if resume else load_recipe(shipped.find_recipe(what), overrides)
    quiet = {
        "eval": config.eval.model_copy(update={"every": None}), "log": config.log.model_copy(update={"trees_every": None})
    }  # fmt: skip
    if resume is None:
        # an unused name, as an existing run would be refused and nothing is written
        quiet["run"] = config.run.model_copy(update={"name": f"{config.run.name}-profile"})
    # the profiler sees one process
    return config.model_copy(update={**quiet, "cluster": None}), resume


def profile_steps(run: Run, state: TrainState, steps: int) -> dict[str, Any]:
    """Take `steps` + 2 training steps: one warm-up, `steps` timed, one under the profiler."""
    state, _ = train_step(run, state)
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(steps):
        began = time.perf_counter()
        state, report = train_step(run, state)
        whole = time.perf_counter() - began
        figures: Any = report.metrics
        for phase in ("sample", "reward", "learn"):
            times[phase].append(figures[f"time/{phase}"])
        times["other"].append(whole - sum(times[phase][-1] for phase in ("sample", "reward", "learn")))
        times["step"].append(whole)
        times["sampled_tokens"].append(figures["sampled_tokens"])
    phases = {"sample": PhaseProfile(), "learn": PhaseProfile()}
    watched_sample, watched_update, device = run.engine.sample, run.learner.update, run.policy.device
    run.engine.sample = _watched(watched_sample, phases["sample"], run.config.engine_dtype, device)  # type: ignore[method-assign]
    run.learner.update = _watched(watched_update, phases["learn"], run.config.learner.dtype, device)  # type: ignore[method-assign]
    try:
        train_step(run, state)
    finally:
        run.engine.sample, run.learner.update = watched_sample, watched_update  # type: ignore[method-assign]
    dtypes = {"sample": run.config.engine_dtype, "learn": run.config.learner.dtype}
    peaks = {dtype: measure_peak(dtype, device) for dtype in set(dtypes.values())}
    return {
        "seconds": {phase: statistics.median(values) for phase, values in times.items() if phase != "sampled_tokens"},
        "sampled_tokens": statistics.median(times["sampled_tokens"]),
        "threads": torch.get_num_threads(),
        "phases": {name: each.summary(peaks[dtypes[name]], dtypes[name]) for name, each in phases.items()},
    }


def _watched(function: Callable[..., Any], into: PhaseProfile, dtype: str, device: torch.device) -> Callable[..., Any]:
    width, gpu = 2 if dtype == "bfloat16" else 4, device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]

    def watched(*args: Any, **kwargs: Any) -> Any:
        with profile(activities=activities, record_shapes=True) as recorded:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            _wait_for(device)
            into.wall_s += time.perf_counter() - began
        into.add(recorded.key_averages(group_by_input_shape=True), width, gpu=gpu)
        return result

    return watched


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kind_of(operator: str) -> str:
    """Kind of an operator, from its name."""
    for kind, beginnings in KINDS:
        if operator.startswith(beginnings):
            return kind
    return OTHER


def product_cost(shapes: list[list[int]]) -> tuple[float, float]:
    """Operations and numbers touched of one matrix product, from the shapes of its inputs (the last two are factors).

    `[M, K] @ [K, N]`: 2·M·K·N operations; M·K + K·N + M·N numbers.

    >>> product_cost([[2, 3], [3, 5]])
    (60.0, 31.0)
    """
    left, right = [s for s in shapes if len(s) in (2, 3)][-2:]
    batch = left[0] if len(left) == 3 else 1
    m, k, n = left[-2], left[-1], right[-1]
    return float(batch * 2 * m * k * n), float(batch * (m * k + k * n + m * n))


def measure_peak(dtype: str, device: torch.device, size: int | None = None, copied_mb: int = 256) -> Peak:
    """Measure the fastest of five square products and of five copies of a block of `copied_mb` MiB.

    Args:
        size: of the products; None: 1536, and 8192 on a GPU, which is idle for the most part of a smaller one.
    """
    size = size or (8192 if device.type == "cuda" else 1536)
    kind = getattr(torch, dtype)
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    block = torch.zeros(copied_mb * 2**18, device=device)
    target = torch.empty_like(block)

    def best(work: Callable[[], object]) -> float:
        work()
        _wait_for(device)
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            work()
            _wait_for(device)
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    product, copied = best(lambda: a @ b), best(lambda: target.copy_(block))
    return Peak(2 * size**3 / product, 2 * copied_mb * 2**20 / copied)  # a copy reads and writes


def show(out: Console, result: dict[str, Any]) -> None:
    """Print the result of `profile_steps` as tables and sentences."""
    seconds = result["seconds"]
    out.print(f"{result['what']}: a step, {result['threads']} threads")
    parts = ("sample", "reward", "learn", "other", "step")
    rows = [(part, f"{seconds[part]:.2f}", f"{seconds[part] / seconds['step']:.0%}") for part in parts]
    print_columns(out, ("phase", "seconds", "share"), rows)
    out.print(f"{result['sampled_tokens']:,.0f} tokens sampled, {result['sampled_tokens'] / seconds['sample']:,.0f} a second")
    out.print("within a phase, under the profiler")
    columns = ("kind of work", *(f"{name} ({phase['dtype']})" for name, phase in result["phases"].items()))
    kinds = [kind for kind, _ in KINDS] + [OTHER, PYTHON]
    shares = [(kind, *(f"{each['shares'].get(kind, 0.0):.0%}" for each in result["phases"].values())) for kind in kinds]
    print_columns(out, columns, shares)
    for name, phase in result["phases"].items():
        rate = phase["products"]
        if not rate["gflop_per_s"]:
            out.print(f"{name}: no matrix product in the profiled step (no group had both rewards?)")
            continue
        near = "arithmetic" if rate["share_of_peak"] >= rate["share_of_bandwidth"] else "reading weights"
        out.print(
            f"{name}: matrix products at {rate['gflop_per_s']:,.0f} GFLOP/s ({rate['share_of_peak']:.0%} of a large square "
            f"one) and {rate['gb_per_s']:.1f} GB/s ({rate['share_of_bandwidth']:.0%} of a copy): bound by {near}",
            soft_wrap=True,
        )
