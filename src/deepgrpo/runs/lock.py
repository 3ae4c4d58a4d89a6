"""The lock of a run directory: one process at a time writes there. Readers such as `deepgrpo report` need no lock.

The system holds the lock (`flock` on RUN/.lock) and releases it when the process ends, however it ends. The file names the
holder, for the message. On a network file system the lock is as good as that file system's locks: NFS 4 has them between
machines; where there are none at all, the run goes on without a lock and says so.
"""

from __future__ import annotations

import errno
import io
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deepgrpo.errors import ConfigError
from deepgrpo.runs.files import remedy
from deepgrpo.runs.layout import RunDir, shown

NO_LOCKS = "the file system of {} has no locks: make sure that no other run writes there"
_WITHOUT = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def hold(run: RunDir) -> Iterator[str | None]:
    """Hold the lock of a run directory, which is created if it is missing; yield a remark for the log, usually None.

    At the end the lock's file goes, and a directory that was created and has stayed empty.

    Raises ConfigError if another process holds the lock, or the directory cannot be written.
    """
    made: list[Path] = []
    try:
        _make(run.path, made)
        with _locked(run) as remark:
            yield remark
    finally:
        with suppress(OSError):
            for directory in reversed(made):
                directory.rmdir()


def _make(directory: Path, made: list[Path]) -> None:
    """Create a directory and its parents; those that are new are added to `made`."""
    try:
        for path in (*reversed(directory.parents), directory):
            if not path.is_dir():
                path.mkdir()
                made.append(path)
    except OSError as error:
        raise _unwritable(directory, error) from error


@contextmanager
def _locked(run: RunDir) -> Iterator[str | None]:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield NO_LOCKS.format(shown(run.path))
        return
    while True:
        file = _open(run)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                if error.errno not in _WITHOUT:
                    raise ConfigError(_holder(run.path, file.read(1000))) from None
            yield NO_LOCKS.format(shown(run.path))
            return
        # the former holder may have removed the file between our opening and our locking it
        with suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), run.lock.stat()):
                break
        file.close()
    with file:
        os.register_at_fork(after_in_child=file.close)  # else a child that outlives this process would hold the lock
        with suppress(OSError):  # a full disk: the lock holds all the same
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}).encode())
        try:
            yield None
        finally:
            if not file.closed:
                with suppress(OSError):
                    run.lock.unlink()


def holder(run: RunDir) -> str | None:
    """A sentence about the process that holds the lock of a run directory; None if no process does."""
    try:
        import fcntl

        with run.lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return None if error.errno in _WITHOUT else _holder(run.path, file.read(1000)).removeprefix("run.name: ")
    except (ImportError, OSError):
        pass  # no lock, or none on this system
    return None


def _open(run: RunDir) -> io.FileIO:
    try:
        return io.FileIO(os.open(run.lock, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    except OSError as error:
        raise _unwritable(run.path, error) from error


def _unwritable(directory: Path, error: OSError) -> ConfigError:
    at = shown(directory)
    return ConfigError(
        f"run.dir: {at} cannot be written: {error.strerror or error}; {remedy(error)}, or choose another place with "
        "--run.dir and --run.name"
    )


def _holder(directory: Path, text: bytes) -> str:
    """The message about a lock that another process holds."""
    at = shown(directory)
    try:
        found = json.loads(text)
        pid, host = int(found["pid"]), str(found["host"])
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(found["since"])))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return f"run.name: {at} is in use by another process; wait for it to end, or choose another with --run.name NAME"
    if pid == os.getpid() and host == socket.gethostname():
        return (
            f"run.name: {at} is in use by this process: a run of `steps` is still open there, as after an error in a loop over "
            "it; close it with .close() or by a with block, or choose another with run.name"
        )
    said = f"run.name: {at} is in use by process {pid} on {host} since {since}"
    if host == socket.gethostname() and not _alive(pid):
        return (
            f"{said}; that process has ended, but one that it started still holds the lock (`fuser {at}/.lock` names "
            "it): end that one"
        )
    return f"{said}; wait for it to end, end it with `kill {pid}`, or choose another with --run.name NAME"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
