"""Processes that end: children with their parent, and this one although a user's threads still run.

    end_with_parent     watches the process that started this one; portable, from a thread
    killed_with_parent  the same by the kernel, also while C code holds the interpreter (Linux)
    end_within          ends this process although a thread or an exit handler of a user's code does not end
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

PARENT = "DEEPGRPO_PARENT"
"""Environment variable with the process whose end is a request to stop."""

POLL_S = 0.5
_PR_SET_PDEATHSIG = 1


def end_with_parent(end: Callable[[], None], alive: Callable[[float], bool] | None = None) -> None:
    """Call `end` from a daemon thread once the parent process has ended.

    Args:
        alive: waits up to that many seconds; False once the parent has ended. Default: by the number of the parent.
    """
    first = os.getppid()

    def same_parent(seconds: float) -> bool:
        time.sleep(seconds)
        return os.getppid() == first

    def watch() -> None:
        while (alive or same_parent)(POLL_S):
            pass
        end()

    threading.Thread(target=watch, name="deepgrpo-parent", daemon=True).start()


def end_worker_with_parent() -> None:
    """Kill this worker of `multiprocessing` once the process that uses it has ended, even by SIGKILL.

    A worker from a fork server is a child of that server, which ends when all holders of a pipe have. The worker gives up its
    own end of that pipe, so the server ends with our process, and the kernel kills the worker with the server.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if "forkserver" in multiprocessing.get_all_start_methods():
        from multiprocessing import forkserver

        server: Any = forkserver._forkserver
        held, server._forkserver_alive_fd = server._forkserver_alive_fd, None
        if held is not None:
            with contextlib.suppress(OSError):
                os.close(held)
    killed_with_parent()

    def alive(seconds: float) -> bool:
        parent.join(seconds)
        return parent.is_alive()

    end_with_parent(kill_this, alive)


def killed_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        before = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != before:  # it ended meanwhile
            kill_this()


def kill_this() -> None:
    """End this process at once."""
    if hasattr(signal, "SIGKILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(1)


def follow_parent() -> None:
    """Stop like after SIGTERM (save, then end) once the process named by DEEPGRPO_PARENT has ended, if it started this one."""
    if os.environ.get(PARENT) == str(os.getppid()):
        end_with_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))


def end_within(seconds: float, code: int) -> None:
    """End this process with the exit code if it still runs after so many seconds.

    Call it when all work is done. Python waits for threads that are no daemons, for child processes and for exit handlers;
    those of a user's code may never end.
    """

    def watch() -> None:
        time.sleep(seconds)
        with contextlib.suppress(Exception):
            left = [each.name for each in threading.enumerate() if not each.daemon and each is not threading.main_thread()]
            left += [child.name for child in multiprocessing.active_children()]
            print(
                f"ended without waiting longer than {seconds:g} s for what your code left running: "
                f"{', '.join(left) or 'an exit handler'}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            sys.stdout.flush()
        import psutil

        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        os._exit(code)

    threading.Thread(target=watch, name="deepgrpo-end", daemon=True).start()
