"""Golden traces: ten training steps per strategy, reduction and layout, kept to the last digit.

Record all of them anew, some half a minute: `.venv/bin/python tests/golden/record.py`; only some: with their names behind it.
`tests/equivalence/test_golden.py` says when that is the right thing to do, and what is covered.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MACHINE = HERE / "machine.json"
STEPS = 10

MODEL = {"type": "scratch", "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "max_position": 48}
SEGMENTS = {"type": "tokens", "size": 3}
PIVOTS = {"num_rollouts": 4, "branches_per_pivot": 3, "segments": SEGMENTS}
FIT = {"window": 40, "min_items": 4}

STRATEGIES: dict[str, dict[str, Any]] = {
    "root": {"num_rollouts": 6},
    "deep": {**PIVOTS, "gamma": 2.0, "recoverability": FIT},
    "random": PIVOTS,
    "treerl": {"num_rollouts": 3, "num_pivots": 2, "branches_per_pivot": 2, "mask_after": ["#"]},
    "attnrl": {"num_rollouts": 3, "num_pivots": 2, "branches_per_pivot": 2, "top_share": 0.5, "lag": 1, "segments": SEGMENTS},
    "fr3e": {"num_bases": 3, "num_anchors": 2, "rollouts_per_state": 2},
    "spo_tree": {"branching": [2, 2, 2], "segment_tokens": 4},
    "oracle": {"num_rollouts": 4, "branches_per_pivot": 3},
}  # fmt: skip

WITH_CONSTANT: dict[str, dict[str, Any]] = {
    "deep": {"num_pivots": 2, "expand": "all", "root_pivot": False, "gamma": -1.0},
    "random": {"num_pivots": 2, "expand": "all", "root_pivot": False},
    "treerl": {
        "num_rounds": 2, "leaf_values": "leave_one_out", "token_mean": "remove", "node_values": "sum", "zero_local": "copy",
        "keep_leaves": 6,
    },
    "attnrl": {"spacing": 2},
    "fr3e": {"values": "positive_advantage", "sharpen": True},
    "spo_tree": {"advantage": "siblings"},
}  # fmt: skip
"""Other switches of the strategies, those of released code among them: in the traces with the reduction `constant`."""

REDUCTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "token": {"loss": {"beta": 0.02, "lambda": 0.5}},
    "sequence": {
        "loss": {"beta": 0.0, "clip_low": 0.02, "clip_high": 0.03, "importance": "on", "importance_cap": 1.2},
        "optim": {"minibatches": 2},
        "sampling": {"top_p": 0.9, "temperature": 0.9},
    },
    "constant": {
        "loss": {
            "beta": 0.01, "lambda": 1.5, "lambda_scales_kl": True, "streams": "merged", "ratio": "sequence",
            "sequence_clip_low": 3e-3, "sequence_clip_high": 4e-3, "reduction_length": 10,
        },
        "optim": {"minibatches": 2},
        "credit": {"scale": "std", "whiten": True},
        "reward": {"overlong": {"cache": 5, "penalty": 0.25}},
    },
}  # fmt: skip

SWITCHES: dict[str, dict[str, dict[str, Any]]] = {
    "cispo": {
        "loss": {"beta": 0.01, "lambda": 0.5, "policy": "cispo", "cispo_low": 0.98, "cispo_high": 1.02},
        "optim": {"minibatches": 2},
    },
    "mean": {
        "loss": {"beta": 0.01, "clip_low": 0.02, "clip_high": 0.03},
        "optim": {"minibatches": 2},
        "credit": {"scale": "mean"},
    },
    "mask": {
        "loss": {
            "beta": 0.01, "clip_low": 0.02, "clip_high": 0.03, "importance": "on", "importance_mode": "mask",
            "importance_low": 0.908, "importance_high": 0.916,
        },
        "optim": {"minibatches": 2},
        "sampling": {"top_p": 0.9},
    },
}  # fmt: skip
"""Further switches, each recorded with `deep` and the reduction `token` only."""

LAYOUTS = {"packed": "on", "rows": "off"}
UNSCALED = ("treerl", "attnrl")
"""Strategies that refuse `credit.scale = "std"`."""
BRANCHING = ("deep", "random", "oracle")
"""Strategies with a branch stream."""


@dataclass(frozen=True)
class Trace:
    """One of the traces: its name and its recipe."""

    strategy: str
    reduction: str
    """Key of REDUCTIONS or SWITCHES."""
    layout: str

    @property
    def name(self) -> str:
        return f"{self.strategy}-{self.reduction}-{self.layout}"

    @property
    def path(self) -> Path:
        return HERE / f"{self.name}.json"

    def recipe(self, directory: Path) -> dict[str, Any]:
        """A recipe as a nested dict; the run goes into `directory`."""
        changes = REDUCTIONS.get(self.reduction) or SWITCHES[self.reduction]
        constant = self.reduction == "constant"
        credit = dict(changes.get("credit", {}))
        if self.strategy in UNSCALED:
            credit.pop("scale", None)
        return {
            "run": {
                "dir": str(directory), "name": self.name, "steps": STEPS, "prompts_per_step": 3, "device": "cpu", "seed": 5,
                "threads": 1,
            },
            "model": MODEL,
            "data": {"type": "synthetic", "chain_length": 1},
            "reward": {
                "type": "user", "function": f"{HERE / 'reward.py'}:reward", "truncated_value": "none",
                **changes.get("reward", {}),
            },
            "sampling": {"max_new_tokens": 10, **changes.get("sampling", {})},
            "explore": {
                "type": self.strategy, **STRATEGIES[self.strategy], **(WITH_CONSTANT.get(self.strategy, {}) if constant else {})
            },
            "credit": credit,
            "loss": {"reduction": self.reduction if self.reduction in REDUCTIONS else "token", **changes["loss"]},
            # a large eps: without it the direction of a weight without gradient is that of rounding
            "optim": {"lr": 3e-3, "eps": 1e-4, **changes.get("optim", {})},
            "learner": {"tree_packing": LAYOUTS[self.layout], "tokens_per_pack": 384},
            "checkpoint": {"every": "none"},
            "log": {"trees_every": "none"},
        }  # fmt: skip


TRACES = [Trace(strategy, reduction, layout) for strategy in STRATEGIES for reduction in REDUCTIONS for layout in LAYOUTS]
TRACES += [Trace("deep", switch, "packed") for switch in SWITCHES]


def run(trace: Trace, directory: Path) -> list[dict[str, Any]]:
    """The steps of a trace by the code as it is: metrics.jsonl without what a clock measured."""
    import torch

    from deepgrpo.config import parse_config
    from deepgrpo.train.loop import train

    torch.set_num_threads(1)
    lines = (train(parse_config(trace.recipe(directory))) / "metrics.jsonl").read_text().splitlines()
    timed = ("time/", "ledger/seconds_", "tokens_per_s")
    return [{key: value for key, value in json.loads(line).items() if not key.startswith(timed)} for line in lines]


def recorded(trace: Trace) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = json.loads(trace.path.read_text())
    return steps


def machine() -> dict[str, str]:
    """Properties of the machine that decide how floats are rounded; on equal ones traces are compared bit by bit."""
    import torch

    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping")
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in wanted:
                found.setdefault(key.strip(), value.strip())
    except OSError:
        import platform

        found["model name"] = platform.processor()
    switches = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
    return {
        **found,
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{switch: os.environ[switch] for switch in switches if switch in os.environ},
    }


def without_signal(trace: Trace, steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Kinds of signal missing from a trace, without which it cannot detect a change; empty if complete."""
    lacks: list[str] = []
    for stream in ("main", "branch") if trace.strategy in BRANCHING else ("main",):
        terms = sum(bool(step.get(f"{stream}/terms")) and abs(step[f"{stream}/loss"]) > 1e-6 for step in steps)
        mixed = sum(step.get(f"{stream}/mixed", 0.0) > 0 for step in steps)
        if min(terms, mixed) < 0.8 * STEPS:
            lacks.append(f"{stream}: a loss in {terms} and a mixed group in {mixed} of {len(steps)} steps")
    if trace.reduction != "token" and not any(step.get("main/clip_fraction") for step in steps):
        lacks.append("no ratio was clipped")
    if trace.reduction != "sequence" and not max(step.get("main/kl") or 0.0 for step in steps) > 1e-4:
        lacks.append("no KL")
    if trace.reduction == "sequence" and all(abs(step["mismatch/weight"] - 1.0) < 1e-3 for step in steps):
        lacks.append("no importance weight")
    if trace.reduction == "mask" and not all(0 < step.get("mismatch/masked", 0.5) < 0.9 for step in steps):
        lacks.append("a step without a masked token")
    return lacks


def main(names: Sequence[str]) -> int:
    """Record the traces of these names, or all."""
    unknown = set(names) - {trace.name for trace in TRACES}
    if unknown:
        print(f"no such trace: {', '.join(sorted(unknown))}; there are: {', '.join(trace.name for trace in TRACES)}")
        return 2
    if names and (not MACHINE.exists() or json.loads(MACHINE.read_text()) != machine()):
        print("the other traces are from another machine; record all, without names")
        return 2
    poor = 0
    for trace in TRACES:
        if names and trace.name not in names:
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            steps = run(trace, Path(directory))
        lacks = without_signal(trace, steps)
        poor += bool(lacks)
        trace.path.write_text("[\n" + ",\n".join(json.dumps(step) for step in steps) + "\n]\n")
        print(f"{trace.name}: {time.perf_counter() - began:.2f} s {'; '.join(lacks)}", file=sys.stderr)
    MACHINE.write_text(json.dumps(machine(), indent=1) + "\n")
    if poor:
        print(f"{poor} traces without enough signal: change the seed or the recipe above", file=sys.stderr)
    return int(poor > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
