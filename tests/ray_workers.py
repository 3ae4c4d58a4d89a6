"""Ray's worker processes as forks of one process that has imported everything (see commands.py).

Ray starts every worker with an interpreter that imports ray twice, torch and transformers: seven seconds of a processor for
each rollout worker, learner and reward worker of each run. A Ray node that is told `setup_worker_path=SETUP` runs this file
instead, which asks the waiting process for a fork. It has the environment, arguments and pipes that Ray meant, and tells Ray
its own process number. Commands of `deepgrpo` that are started here do the same. That real workers start is tested in
test_driver.py, by the run whose driver was killed.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import commands

SETUP = str(Path(__file__).resolve())
KILL = "DEEPGRPO_KILL_BEFORE_RENAME"
"""Environment variable of a command: the name of a file; see `kill_before_rename`."""
MODULE = "ray._private.workers.default_worker"


class RayWorkers(commands.Starter):
    """Starts commands whose Ray forks its workers, and serves Ray nodes of this process."""

    before = "ray_workers:prepare"


def prepare(environ: dict[str, str]) -> None:
    """Prepare a command that has been forked."""
    os.environ.update(environ)  # Ray reads its settings when it is imported
    fork_workers()
    if KILL in environ:
        kill_before_rename(environ[KILL])


def ask(arguments: list[str]) -> int:
    """Have a worker forked, and last as long as it does. Its arguments follow the path of Ray's own script."""
    first = next(i for i, each in enumerate(arguments) if each.endswith("default_worker.py")) + 1
    for_setup = ("--language=", "--serialized-runtime-env-context=")
    own = [each for each in arguments[first:] if not each.startswith(for_setup)]
    link = socket.socket(socket.AF_UNIX)
    link.connect(str(Path(os.environ[commands.SHARED]) / "socket"))
    commands.request(MODULE, own, Path.cwd(), dict(os.environ), link, (1, 2))
    with link.makefile() as answers:
        pid = int(answers.readline())
        signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
        return int(answers.readline() or 1)


def fork_workers(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have a Ray that this process starts fork its workers, and leave out its monitors, which take seconds to start."""
    from ray._private.parameter import RayParams

    original = RayParams.update_if_absent

    def forking(self: Any, **given: Any) -> None:
        self.no_monitor = True
        original(self, **{**given, "setup_worker_path": SETUP, "include_log_monitor": False})

    patch(RayParams, "update_if_absent", forking)


def kill_before_rename(name: str) -> None:
    """SIGKILL to this process where it would rename a file or directory of that name."""
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.rename = killed  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1:]) & 0xFF)
