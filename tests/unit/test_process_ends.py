"""Processes that we start end with us, also after SIGKILL: math workers, the vLLM process, jobs of compare."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deepgrpo import processes
from deepgrpo.engines.vllm.process import CHILD
from deepgrpo.lab.compare.jobs import environment


def gone(pid: int, seconds: float = 200.0) -> bool:
    """True once a process has ended; a child that nobody waits for counts as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


CHECKS = """
import os, sys, time, itertools
from functools import partial
from deepgrpo.rewards.workers import Workers, limit_memory

def check(kind):
    print(os.getpid(), flush=True)
    if kind == "sleep":
        time.sleep(1000)
    return sum(itertools.repeat(1)), True  # C code that lets no other thread run

if __name__ == "__main__":
    import endless_checks
    print(os.getpid(), flush=True)
    Workers("the test", limit_memory, "endless_checks", count=2, timeout_s=1000).run(
        [partial(endless_checks.check, kind) for kind in ("sleep", "endless")]
    )
"""


def test_math_workers_end_with_their_parent(tmp_path: Path) -> None:
    """Before, the one that computes went on after SIGKILL, with its fork server."""
    (tmp_path / "endless_checks.py").write_text(CHECKS)
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "endless_checks.py")], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert parent.stdout is not None
    with parent.stdout:
        pids = [int(parent.stdout.readline()) for _ in range(3)]
        descendants = [each.pid for each in psutil.Process(parent.pid).children(recursive=True)]
        assert set(pids[1:]) < set(descendants) and len(descendants) >= 3  # and the fork server
        parent.kill()
        parent.wait()
    try:
        assert all(gone(pid) for pid in descendants), [pid for pid in descendants if not gone(pid, 0.1)]
    finally:
        for pid in descendants:
            if not gone(pid, 0.1):
                os.kill(pid, signal.SIGKILL)



def test_the_vllm_process_ends_with_its_parent_in_the_middle_of_a_job(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    # a parent that starts the child in the middle of a long job, tells its number, and waits
    job = (
        f"import sys; sys.path.insert(0, {str(CHILD.parent)!r}); import child, time; "
        f"child._end_with_parent({str(weights)!r}); time.sleep(1000)"
    )
    parent = subprocess.Popen(
        [
            sys.executable, "-S", "-c",
            "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-S', '-c', sys.argv[1]], process_group=0); "
            "print(p.pid, flush=True); time.sleep(1000)",
            job,
        ],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
        deadline = time.monotonic() + 200
        while len(psutil.Process(pid).threads()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        parent.kill()
        parent.wait()
    assert gone(pid)
    assert not weights.exists()


def test_a_job_of_compare_stops_when_compare_has_been_killed() -> None:
    """Its process takes the end of its parent for SIGTERM: save, then end."""
    out, end = os.pipe()

    def parent() -> None:
        os.environ.update(environment(1))
        if not os.fork():
            signal.signal(signal.SIGTERM, lambda *_: [os.write(end, b"stopped"), os._exit(0)])
            processes.follow_parent()
            os.write(end, b"ready ")
        time.sleep(60)

    pid = os.fork()
    if not pid:
        try:
            parent()
        finally:
            os._exit(1)
    os.close(end)
    with os.fdopen(out, "rb") as pipe:
        assert pipe.read(6) == b"ready "
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert pipe.read() == b"stopped"


def test_a_process_follows_only_the_parent_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "end_with_parent", lambda end: pytest.fail("it follows"))
    monkeypatch.delenv(processes.PARENT, raising=False)
    processes.follow_parent()
    monkeypatch.setenv(processes.PARENT, str(os.getpid()))  # set by this process for its children; it is not its own parent
    processes.follow_parent()
    assert environment(1)[processes.PARENT] == str(os.getpid())
