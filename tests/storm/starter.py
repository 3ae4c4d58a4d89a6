"""Commands that list their file operations, or kill themselves at one of them.

    STORM_LIST=FILE     write every operation on a run directory to that file
    STORM_KILL_AT=7     SIGKILL before the seventh

An operation is what Python reports to audit hooks: opening, creating, renaming and removing files and directories.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import commands

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


class Starter(commands.Starter):
    before = "storm.starter:watch"


def watch(environ: dict[str, str], mark: str = "runs/") -> None:
    """Install the hook that the environment asks for.

    Args:
        mark: part of the path of every run directory.
    """
    listed = os.open(environ["STORM_LIST"], os.O_WRONLY | os.O_CREAT | os.O_APPEND) if "STORM_LIST" in environ else None
    last = int(environ.get("STORM_KILL_AT", 0))
    if listed is None and not last:
        return
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in OPERATIONS:
            return
        path = arguments[0]
        # rmtree removes by name inside an open directory
        inside = event in ("os.remove", "os.rmdir") and arguments[1] not in (-1, None)
        if not (inside or mark in os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else False):
            return
        count += 1
        if listed is not None:
            os.write(listed, f"{event} {os.fsdecode(path)}\n".encode())
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
