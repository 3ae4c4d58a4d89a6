"""vLLM inside rollout workers, on a real Ray. `make test-vllm` runs these."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from vllm_here import needs_vllm

ray = pytest.importorskip("ray")

from deepgrpo.cluster.pool import WorkerPool  # noqa: E402
from deepgrpo.cluster.run import train_on_cluster  # noqa: E402
from deepgrpo.config import Config, parse_config  # noqa: E402
from deepgrpo.runs.trees import load_trees  # noqa: E402
from deepgrpo.train.loop import train  # noqa: E402

pytestmark = needs_vllm

RECIPE: dict[str, Any] = {
    "run": {"steps": 2, "prompts_per_step": 4, "device": "cpu"},
    # heads of 32, which vLLM knows on a CPU
    "model": {
        "type": "scratch", "hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_position": 96
    },
    "warmstart": {"steps": 40, "batch_size": 16, "lr": 1e-2},
    "data": {"type": "synthetic", "chain_length": 1},
    "reward": {"type": "task"},
    "sampling": {"max_new_tokens": 12},
    "engine": {"type": "vllm", "eager": True, "kv_cache_gb": 0.25, "max_rows": 32, "dtype": "float32"},
    "explore": {
        "type": "deep", "num_rollouts": 4, "branches_per_pivot": 3, "segments": {"type": "tokens", "size": 3},
    },
    "optim": {"lr": 1e-3, "eps": 1e-4},
    "log": {"trees_every": 1},
}  # fmt: skip


def recipe(directory: Path, name: str, **sections: Any) -> Config:
    return parse_config({**RECIPE, **sections, "run": {**RECIPE["run"], "dir": str(directory), "name": name}})


def child_of(pid: int) -> int:
    """The process that runs vLLM for a rollout worker."""
    found = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    (child,) = [
        int(line.split()[0]) for line in found.splitlines() if line.split()[1] == str(pid) and "vllm/child.py" in line
    ]
    return child


def test_rollout_workers_with_vllm_and_one_that_loses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers; vLLM of one is killed in the middle of step 1: the same trees as from one process."""
    alone = train(recipe(tmp_path, "alone"))
    sample, killed = WorkerPool.sample, []

    def wrapped(self: WorkerPool, *arguments: Any, **options: Any) -> Any:
        if self.learner_nodes and not killed:
            pid = child_of(self.workers[0].ready.pid)
            killed.append(pid)
            os.kill(pid, signal.SIGSTOP)  # so that it cannot finish what it is about to get
            threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
        return sample(self, *arguments, **options)

    monkeypatch.setattr(WorkerPool, "sample", wrapped)
    run = train_on_cluster(
        recipe(tmp_path, "workers", cluster={"rollout_workers": 2, "learners": 1, "start_deadline_s": 3000})
    )
    for step in (1, 2):
        ours, theirs = (load_trees(each / "trees" / f"step-{step:06d}.jsonl.gz") for each in (run, alone))
        assert [[n.tokens for n in tree.nodes] for tree in ours] == [[n.tokens for n in tree.nodes] for tree in theirs]
        assert [tree.pivots for tree in ours] == [tree.pivots for tree in theirs]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["cluster/worker_lost"] == last["cluster/worker_started"] == 1
    text = (run / "log.txt").read_text()
    assert "rollout worker 0 has lost its engine (vLLM's process was killed by SIGKILL during the job" in text
    assert "sampled by vLLM" in text
