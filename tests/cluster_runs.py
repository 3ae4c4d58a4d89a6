"""A small recipe for runs on a cluster, and the figures of two runs compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray_workers import SETUP

from deepgrpo.config import Config, parse_config
from deepgrpo.runs.trees import load_trees

# eps is large enough that AdamW does not turn the rounding of a gradient near zero into a whole step
RECIPE: dict[str, Any] = {
    "run": {"steps": 3, "prompts_per_step": 4, "device": "cpu"},
    "model": {
        "type": "scratch", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_position": 96
    },
    "warmstart": {"steps": 40, "batch_size": 16, "lr": 1e-2},
    "data": {"type": "synthetic", "chain_length": 1},
    "reward": {"type": "task"},
    "sampling": {"max_new_tokens": 12},
    "explore": {
        "type": "deep", "num_rollouts": 4, "branches_per_pivot": 3, "segments": {"type": "tokens", "size": 3},
        "recoverability": {"window": 20, "min_items": 4},
    },
    "loss": {"beta": 0.01},
    "optim": {"lr": 1e-3, "eps": 1e-4},
    "learner": {"tokens_per_pack": 100},
    "eval": {"every": 2, "limit": 8, "data": {"type": "synthetic", "chain_length": 1, "split": "test"}},
    "checkpoint": {"every": 1},
    "log": {"trees_every": 1},
}  # fmt: skip
TWO = {"rollout_workers": 2, "learners": 2}
NODE: dict[str, Any] = {"num_cpus": 2, "setup_worker_path": SETUP, "include_log_monitor": False}


def recipe(directory: Path, name: str, cluster: dict[str, Any] | None = None, steps: int = 3) -> Config:
    run = {**RECIPE["run"], "dir": str(directory), "name": name, "steps": steps}
    # on a machine that has other things to do, loading the model may take a while
    section = {"cluster": {"start_deadline_s": 3000, **cluster}} if cluster else {}
    return parse_config({**RECIPE, "run": run, **section})


def trace(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured, and without what the cluster says of itself."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = ("time/", "ledger/seconds_", "tokens_per_s", "cluster/", "ledger/prefix_tokens_encoded", "prefix/", "branch/prefix_")
    return [{key: value for key, value in line.items() if not key.startswith(own)} for line in lines]


def assert_same(run: Path, alone: Path) -> None:
    """Every figure up to rounding; tokens and pivots exactly."""
    ours, theirs = trace(run), trace(alone)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [0, 1, 2, 3]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            if isinstance(value, float):
                assert one[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    for step in (1, 2, 3):
        a, b = (load_trees(each / "trees" / f"step-{step:06d}.jsonl.gz") for each in (run, alone))
        assert [tree.pivots for tree in a] == [tree.pivots for tree in b]
        assert [[n.tokens for n in tree.nodes] for tree in a] == [[n.tokens for n in tree.nodes] for tree in b]
    assert sum(line.get("pivots/count", 0) for line in ours) > 5 and any(line.get("branch/loss") for line in ours)


def counters(run: Path) -> dict[str, float]:
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {key.removeprefix("cluster/"): value for key, value in last.items() if key.startswith("cluster/") and value}
