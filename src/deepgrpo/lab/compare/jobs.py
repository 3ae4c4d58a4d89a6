"""Run commands in parallel, each in its own process, in the order of their dependencies.

A crashed job affects only its dependents, which are skipped. The first Ctrl-C or SIGTERM starts no further job and asks the
running ones to save and end after their step; a second Ctrl-C ends them at once.

Jobs stay in the process group of the caller, so signals from the terminal reach them too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from deepgrpo.processes import PARENT
from deepgrpo.threads import CPUS, available_cpus

State = Literal["waiting", "running", "done", "failed", "skipped"]

POLL_S = 0.2
"""Seconds between two polls of the running jobs."""


@dataclass(frozen=True, slots=True)
class Job:
    """A command `python -m MODULE ARGUMENT ...`.

    Example: Job("deep-seed-1", ("deepgrpo.cli", "train", "jobs/deep-seed-1.toml"), Path("jobs/deep-seed-1.log"),
    after=("_warmstart-seed-1",), finished=lambda: ...).
    """

    name: str
    command: tuple[str, ...]
    log: Path
    """File that its output is appended to."""
    finished: Callable[[], bool]
    """True once the result exists; checked before starting, in which case the job is not run, and after."""
    after: tuple[str, ...] = ()
    """Names of jobs that must finish first."""


class Jobs:
    """A queue of jobs and their states."""

    def __init__(self, jobs: Sequence[Job], *, workers: int, keep_open: Sequence[int] = ()) -> None:
        """Queue the jobs.

        Args:
            jobs: in order of priority.
            workers: number of parallel jobs.
            keep_open: file descriptors that the jobs inherit (a lock).
        """
        self.jobs, self.workers, self.keep_open = list(jobs), workers, tuple(keep_open)
        self.state: dict[str, State] = {job.name: "waiting" for job in jobs}
        self.exit_codes: dict[str, int] = {}
        """Exit code of each job that was started and has ended, by name; the newest one."""
        self.stopping = False
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        for job in self.jobs:
            if job.finished():
                self.state[job.name] = "done"
        self._skip()

    def run(
        self, changed: Callable[[Job, State], None] = lambda job, state: None, tick: Callable[[], None] = lambda: None
    ) -> None:
        """Run all jobs whose dependencies succeed.

        Args:
            changed: called when a job starts or ends.
            tick: called at every poll.

        Raises KeyboardInterrupt after a stop, once all its jobs have ended.
        """
        with self._signals():
            try:
                while True:
                    self._reap(changed)
                    if not self.stopping:
                        self._start(changed)
                    tick()
                    if not self._running:
                        break
                    time.sleep(POLL_S)
            except BaseException:
                self._signal(signal.SIGTERM)
                for process in self._running.values():
                    process.wait()
                raise
        if self.stopping:
            raise KeyboardInterrupt

    def _start(self, changed: Callable[[Job, State], None]) -> None:
        for job in self.jobs:
            if len(self._running) >= self.workers:
                return
            if self.state[job.name] == "waiting" and all(self.state[name] == "done" for name in job.after):
                self._running[job.name] = self._launch(job)
                self.state[job.name] = "running"
                changed(job, "running")

    def _launch(self, job: Job) -> subprocess.Popen[bytes]:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *job.command], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=environment(self.workers), pass_fds=self.keep_open,
            )  # fmt: skip

    def _reap(self, changed: Callable[[Job, State], None]) -> None:
        for job in self.jobs:
            process = self._running.get(job.name)
            if process is None or process.poll() is None:
                continue
            del self._running[job.name]
            self.exit_codes[job.name] = process.returncode
            if process.returncode == 0 and job.finished():
                self.state[job.name] = "done"
            else:
                # a job that was asked to stop has not failed: it can be continued
                self.state[job.name] = "waiting" if self.stopping else "failed"
            if self.state[job.name] != "waiting":
                changed(job, self.state[job.name])
            self._skip()

    def _skip(self) -> None:
        """Skip jobs that depend on a failed or skipped one."""
        for _ in self.jobs:
            for job in self.jobs:
                if self.state[job.name] == "waiting" and any(self.state[n] in ("failed", "skipped") for n in job.after):
                    self.state[job.name] = "skipped"

    def _signal(self, number: signal.Signals) -> None:
        for process in self._running.values():
            process.send_signal(number)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can catch signals
            return

        def request(number: int, frame: FrameType | None) -> None:
            # after the first signal, a job ends at once on SIGINT and ignores SIGTERM
            again, self.stopping = self.stopping and number == signal.SIGINT, True
            self._signal(signal.SIGINT if again else signal.SIGTERM)

        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def environment(workers: int) -> dict[str, str]:
    """Environment of a job: its share of the CPUs, and this process, with which it ends."""
    share = max(1, available_cpus() // workers)
    return {"TOKENIZERS_PARALLELISM": "false", **os.environ, CPUS: str(share), PARENT: str(os.getpid())}


def last_line(path: Path) -> str:
    """The last non-empty line of a log, or "" if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
