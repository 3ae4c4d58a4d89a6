"""A driver that is killed, and its run resumed by real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

from ray_workers import KILL, RayWorkers

from cluster_runs import assert_same, recipe
from deepgrpo.config import to_toml

RESUME = """
import os, sys
import psutil
from deepgrpo import cli
from deepgrpo.cluster.run import RayBackend

begin_step = RayBackend.begin_step

def look_first(self):
    begin_step(self)
    me = psutil.Process()
    print("listening:", sorted({
        each.laddr.ip.removeprefix("::ffff:") for process in [me, *me.children(recursive=True)]
        for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN
    }), os.environ["RAY_AUTH_MODE"])

RayBackend.begin_step = look_first
sys.exit(cli.main(["train", "--resume", sys.argv[1]]))
"""


def test_the_driver_is_killed_while_it_saves(forks: RayWorkers, alone: Path, tmp_path: Path) -> None:
    """Everything of the second checkpoint is written, and nothing renamed; `--resume` starts a Ray of its own.

    Every process of the resumed run is an interpreter of its own, as in use, and without what the tests tell Ray of addresses:
    all of them listen on loopback only, and ask for Ray's token.
    """
    run = tmp_path / "driver"
    (tmp_path / "recipe.toml").write_text(to_toml(recipe(tmp_path, "driver", {"rollout_workers": 1, "learners": 1})))
    dead = forks.run("train", "recipe.toml", cwd=tmp_path, timeout=1500, **{KILL: ".tmp-step-000002"})
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        ".tmp-step-000002", "step-000000", "step-000001"
    ]  # fmt: skip
    kept = ("RAY_worker_niceness", "RAY_raylet_start_wait_time_s")
    environ = {name: value for name, value in os.environ.items() if name in kept or not name.startswith("RAY_")}
    again = subprocess.run(
        [sys.executable, "-c", RESUME, str(run)], timeout=1500, check=False, capture_output=True, text=True, env=environ
    )
    assert again.returncode == 0, again.stderr
    assert_same(run, alone)
    assert not again.stderr
    assert again.stdout.count("listening: ['127.0.0.1'] token\n") == again.stdout.count("listening:") > 0
