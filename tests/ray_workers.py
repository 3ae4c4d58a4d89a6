"""Ray's worker processes as forks of one process that has imported everything (see commands.py).

Ray starts every worker with an interpreter that imports ray twice, torch and transformers: seven seconds of a processor for
each rollout worker, learner and reward worker of each run. A Ray node that is told `setup_worker_path=SETUP` runs this file
instead, which asks the waiting process for a fork. It has the environment, arguments and pipes that Ray meant, and tells Ray
its own process number. Commands of `deepgrpo` that are started here do the same. That real workers start is tested in
test_cluster.py, by the run whose driver was killed, and in test_network.py.
"""

from __future__ import annotations

import json
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
ADDRESS = "DEEPGRPO_RAY_WORKERS"
"""Environment variable: the socket of the waiting process."""
WORKER = "DEEPGRPO_RAY_WORKER"
"""Environment variable of a request: be a Ray worker, and not `deepgrpo`."""
KILL = "DEEPGRPO_KILL_BEFORE_RENAME"
"""Environment variable of a command: the name of a file; see `kill_before_rename`."""
MODULE = "ray._private.workers.default_worker"


class RayWorkers(commands.Starter):
    """The waiting process, while Ray nodes may ask it."""

    script = __file__

    def __init__(self) -> None:
        super().__init__()
        os.environ[ADDRESS] = self.address

    def close(self) -> None:
        os.environ.pop(ADDRESS, None)
        super().close()


def ask(address: str, arguments: list[str]) -> int:
    """Have a worker forked, and last as long as it does. Its arguments follow the path of Ray's own script."""
    first = next(i for i, each in enumerate(arguments) if each.endswith("default_worker.py")) + 1
    for_setup = ("--language=", "--serialized-runtime-env-context=")
    own = [each for each in arguments[first:] if not each.startswith(for_setup)]
    asked = {"arguments": own, "cwd": os.getcwd(), "environ": {**os.environ, WORKER: "1"}}
    link = socket.socket(socket.AF_UNIX)
    link.connect(address)
    socket.send_fds(link, [json.dumps(asked).encode() + b"\n"], [1, 2])
    with link.makefile() as answers:
        pid = int(answers.readline())
        signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
        return int(answers.readline() or 1)


def fork_workers(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have a Ray that this process starts fork its workers, while there is the waiting process."""
    from ray._private.parameter import RayParams

    original = RayParams.update_if_absent
    patch(
        RayParams, "update_if_absent", lambda self, **given: original(self, **{**given, "setup_worker_path": SETUP})
    )  # fmt: skip


def kill_before_rename(name: str) -> None:
    """SIGKILL to this process where it would rename a file or directory of that name."""
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.rename = killed  # type: ignore[method-assign]


def serve(address: str) -> None:
    main_of = commands.main_of

    def worker_or_command(module: str, arguments: list[str], environ: dict[str, str], out: int, err: int) -> None:
        if environ.pop(WORKER, None):
            main_of(MODULE, arguments, environ, out, err)
        os.environ.update(environ)  # Ray reads its settings when it is imported
        fork_workers()
        if KILL in environ:
            kill_before_rename(environ[KILL])
        main_of(module, arguments, environ, out, err)

    commands.main_of = worker_or_command
    # not ray, for that reason
    commands.MODULES = (*commands.MODULES, "deepgrpo.cluster.sharding", "deepgrpo.train.moments")
    commands.serve(address)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(ask(os.environ[ADDRESS], sys.argv[1:]) & 0xFF)
    serve(sys.argv[1])
