"""The command line in processes of its own that start at once.

Importing torch and transformers takes five seconds of a processor, most of the time of a test that kills, stops and resumes
runs. So one process imports everything and waits, for all pytest workers of a session. For each command it forks: the child has
a process group, a directory, an environment and pipes of its own, and takes signals as any process does. `deepgrpo compare`
starts its jobs in the same way. That `python -m deepgrpo.cli` itself starts is tested in test_cli.py.

Coverage does not follow: what these commands do is covered by tests in one process as well.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

MODULES = (
    "deepgrpo.cli", "deepgrpo.train.loop", "deepgrpo.eval.command", "deepgrpo.lab.compare.command",
    "deepgrpo.lab.compare.final_eval", "deepgrpo.cluster.sharding", "deepgrpo.train.moments",
    "deepgrpo.engines.embedded.engine", "deepgrpo.explore.deep", "transformers.conversion_mapping",
    "transformers.models.llama.modeling_llama", "tyro.constructors", "typeguard",
)  # fmt: skip
"""Modules that the waiting process imports. Not ray, which reads its settings from the environment when it is imported."""
PATIENCE_S = 280.0
"""Seconds that a test waits for a command: on a machine that has other things to do, everything takes its time."""
SHARED = "DEEPGRPO_TESTS_COMMANDS"
"""Environment variable: the directory in which all workers of a session find the waiting process."""
SOCKET = "socket"


class Command:
    """A running command, with the interface of `subprocess.Popen`."""

    def __init__(self, link: socket.socket, out: IO[str], err: IO[str]) -> None:
        self.link, self.stdout, self.stderr = link, out, err
        self.pid = int(self._line())
        self.returncode: int | None = None

    def _line(self) -> str:
        found = b""
        while not found.endswith(b"\n"):
            more = self.link.recv(1)
            if not more:
                raise ChildProcessError("the process that starts commands has died")
            found += more
        return found.decode()

    def poll(self) -> int | None:
        if self.returncode is None:
            self.link.setblocking(False)
            try:
                there = self.link.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                there = b""
            finally:
                self.link.setblocking(True)
            if there:
                self.returncode = int(self._line())
        return self.returncode

    def wait(self, timeout: float = PATIENCE_S) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired("deepgrpo", timeout)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = PATIENCE_S) -> tuple[str, str]:
        """Wait for the end, and read meanwhile: a pipe holds 64 KB."""
        with ThreadPoolExecutor(2) as readers, self.stdout, self.stderr:
            found = [readers.submit(each.read) for each in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()  # which ends what is read
                raise
            out, err = (each.result() for each in found)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Starter:
    """Starts commands of `deepgrpo`, each a fork of one process that has imported everything.

    That process is the one of the directory that `SHARED` names, and ends with the one that named it (`shared_process`).
    """

    before = ""
    """`module:function` that each command calls first, with its environment."""

    def __init__(self) -> None:
        directory = Path(os.environ[SHARED])
        self.address = str(directory / SOCKET)
        with once(directory, SOCKET) as missing:
            if missing:
                _wait_for_requests(directory)

    def start(self, *arguments: str, cwd: Path, module: str = "deepgrpo.cli", **extra: str) -> Command:
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        link = socket.socket(socket.AF_UNIX)
        link.connect(self.address)
        request(module, arguments, cwd, {**os.environ, **extra}, link, (out_end, err_end), self.before)
        for end in (out_end, err_end):
            os.close(end)
        return Command(link, os.fdopen(out), os.fdopen(err))

    def run(self, *arguments: str, cwd: Path, timeout: float = PATIENCE_S, **extra: str) -> subprocess.CompletedProcess[str]:
        command = self.start(*arguments, cwd=cwd, **extra)
        out, err = command.communicate(timeout)
        return subprocess.CompletedProcess(arguments, command.wait(), out, err)


@contextmanager
def once(directory: Path, name: str) -> Iterator[bool]:
    """True for the first worker of a session that comes here; the others wait until it has made the file of that name."""
    with (directory / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not (directory / name).exists()


def request(
    module: str, arguments: Sequence[str], cwd: Path, environ: dict[str, str], link: socket.socket, ends: tuple[int, int],
    before: str = "",
) -> None:  # fmt: skip
    """Ask for `python -m module arguments`, with these ends for its output."""
    asked = {"module": module, "arguments": arguments, "cwd": str(cwd), "environ": environ, "before": before}
    socket.send_fds(link, [json.dumps(asked).encode() + b"\n"], ends)


def _wait_for_requests(directory: Path) -> None:
    plain = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    # a session of its own: it outlives the worker that starts it, and Ctrl-C is for the tests to handle
    process = subprocess.Popen(
        [sys.executable, __file__, str(directory)], stdout=subprocess.PIPE, text=True, env=plain, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    (directory / "pid").write_text(str(process.pid))


@contextmanager
def shared_process() -> Iterator[None]:
    """Name a directory for the waiting process, which starts when it is needed, and end it afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="deepgrpo-commands-"))
    os.environ[SHARED] = str(directory)
    try:
        yield
    finally:
        os.environ.pop(SHARED, None)
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((directory / "pid").read_text()), signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


# ---------------------------------------------------------------- in the waiting process and its children


class Fork:
    """`subprocess.Popen` for a command of our own, `[python, "-m", module, ...]`: a fork in place of a new interpreter."""

    def __init__(self, command: list[str], *, stdout: IO[bytes], env: dict[str, str], **_: Any) -> None:
        self.returncode: int | None = None
        self.pid = fork(lambda: main_of(command[2], command[3:], env, stdout.fileno(), stdout.fileno()))

    def poll(self) -> int | None:
        return self._look(os.WNOHANG)

    def wait(self) -> int:
        found = self._look(0)
        assert found is not None
        return found

    def _look(self, how: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def run_fork(command: list[str], **how: Any) -> SimpleNamespace:
    """`subprocess.run` likewise."""
    return SimpleNamespace(returncode=Fork(command, **how).wait())


def fork(work: Callable[[], None]) -> int:
    """Do some work in a child, which ends with it."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    finally:
        os._exit(70)


def main_of(module: str, arguments: list[str], environ: dict[str, str], out: int, err: int) -> None:
    """Be `python -m module arguments` in this process, and leave it with that one's exit code."""
    os.environ.clear()
    os.environ.update(environ)
    sys.path[1:1] = [each for each in environ.get("PYTHONPATH", "").split(os.pathsep) if each and each not in sys.path]
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = [module, *arguments]
    weakref.finalize._registry.clear()  # temporary directories of the process that forked are not ours to remove
    sys.modules.pop(module, None)
    code: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def serve(directory: str) -> None:
    """Fork for each connection, and tell it the child's number and, at its end, its exit code. Ends with the directory."""
    for each in MODULES:
        importlib.import_module(each)
    # transformers compiles hundreds of patterns when it first saves a model, and keeps them
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("llama")
    for name in ("jobs", "forecast"):
        module: Any = importlib.import_module(f"deepgrpo.lab.compare.{name}")
        module.subprocess = SimpleNamespace(
            Popen=Fork, run=run_fork, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
        )  # fmt: skip
    gc.freeze()  # no child looks through the libraries for garbage, nor copies them by doing so
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(Path(directory) / SOCKET))
    server.listen()
    server.settimeout(10)
    print("ready", flush=True)
    while Path(directory).exists():  # even if the tests are killed, whoever removes what they left ends this
        try:
            link, _ = server.accept()
        except TimeoutError:
            continue
        fork(lambda link=link: _mind(link))  # type: ignore[misc]
        link.close()


def _mind(link: socket.socket) -> None:
    """Start the command of a request, and tell its number and, at its end, its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, ends, _, _ = socket.recv_fds(link, 1 << 20, 2)
    while not text.endswith(b"\n"):
        text += link.recv(1 << 20)
    asked = json.loads(text)

    def command() -> None:
        os.setsid()
        link.close()
        os.chdir(asked["cwd"])
        if asked["before"]:
            module, _, function = asked["before"].partition(":")
            getattr(importlib.import_module(module), function)(asked["environ"])
        main_of(asked["module"], asked["arguments"], asked["environ"], *ends)

    pid = fork(command)
    for end in ends:
        os.close(end)
    link.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    link.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
