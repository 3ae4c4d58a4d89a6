"""vLLM inside rollout workers, on a real Ray. `make test-vllm` runs these."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from vllm_here import needs_vllm

from cluster_runs import assert_same, counters, recipe

ray = pytest.importorskip("ray")

from deepgrpo.cluster.pool import WorkerPool  # noqa: E402
from deepgrpo.cluster.run import train_on_cluster  # noqa: E402
from deepgrpo.train.loop import train  # noqa: E402

pytestmark = needs_vllm

# heads of 32, which vLLM knows on a CPU
VLLM: dict[str, Any] = {
    "model": {"hidden_size": 64},
    "engine": {"type": "vllm", "eager": True, "kv_cache_gb": 0.25, "max_rows": 32, "dtype": "float32", "start_timeout_s": 3000},
}


def child_of(pid: int) -> int:
    """The process that runs vLLM for a rollout worker."""
    found = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    (child,) = [
        int(line.split()[0]) for line in found.splitlines() if line.split()[1] == str(pid) and "vllm/child.py" in line
    ]
    return child


def test_rollout_workers_with_vllm_and_one_that_loses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers; vLLM of one is killed in the middle of step 1: the same trees as from one process."""
    alone = train(recipe(tmp_path, "alone", **VLLM))
    sample, killed = WorkerPool.sample, []

    def wrapped(self: WorkerPool, *arguments: Any, **options: Any) -> Any:
        if self.learner_nodes and not killed:
            pid = child_of(self.workers[0].ready.pid)
            killed.append(pid)
            os.kill(pid, signal.SIGSTOP)  # so that it cannot finish what it is about to get
            threading.Timer(1.0, os.kill, (pid, signal.SIGKILL)).start()
        return sample(self, *arguments, **options)

    monkeypatch.setattr(WorkerPool, "sample", wrapped)
    run = train_on_cluster(recipe(tmp_path, "workers", {"rollout_workers": 2, "learners": 1}, **VLLM))
    assert_same(run, alone)
    assert counters(run).items() >= {"worker_lost": 1, "worker_started": 1}.items()
    text = (run / "log.txt").read_text()
    assert "rollout worker 0 has lost its engine (vLLM's process was killed by SIGKILL during the job" in text
    assert "sampled by vLLM" in text
