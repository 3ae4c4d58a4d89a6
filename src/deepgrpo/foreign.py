"""State of the process that a user's code may change, restored after each call of it.

    working directory, umask · standard streams · handlers of SIGINT and SIGTERM
    torch: default dtype and device, gradient mode, threads, precision, deterministic algorithms, anomaly detection
    torch's random streams, which have a seed of their own during the call

Not restored: environment variables, and the global streams of `random` and numpy. The package reads the former at its start,
and draws nothing from the latter.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}
_Restore = Callable[[], None]


@contextlib.contextmanager
def unchanged_process(torch_seed: int | None = None) -> Iterator[None]:
    """Restore the state of this process after a call of a user's code, however the call ends.

    A child that the user's code forked and that returned from it ends here: it must not go on with our work.

    Args:
        torch_seed: where torch's random streams start during the call; they are restored, too. None: they are shared.
    """
    owner = os.getpid()
    restore = [_directory(), _umask(), _streams(), _signals(), _torch_settings()]
    if torch_seed is not None:
        restore.append(_torch_random(torch_seed))
    code = 0
    try:
        yield
    except SystemExit as left:
        code = exit_code(left)
        raise
    except BaseException:
        code = 1
        raise
    finally:
        leave_if_forked(owner, code)
        for each in restore:
            each()


def leave_if_forked(owner: int, code: int) -> None:
    """End this process if it is a child of the process `owner`."""
    if os.getpid() != owner:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def exit_code(left: SystemExit) -> int:
    """The exit code that Python gives a process that ends by this exception."""
    return left.code & 0xFF if isinstance(left.code, int) else int(left.code is not None)


def _directory() -> _Restore:
    try:
        before = os.getcwd()
    except OSError:  # it has been deleted
        return lambda: None

    def restore() -> None:
        with contextlib.suppress(OSError):
            if os.getcwd() == before:
                return
        with contextlib.suppress(OSError):
            os.chdir(before)

    return restore


def _umask() -> _Restore:
    before = os.umask(0o077)  # it can only be read by setting it
    os.umask(before)

    def restore() -> None:
        os.umask(before)

    return restore


def _streams() -> _Restore:
    """Keeps file descriptors 0 to 2 and the objects of `sys` on them."""
    objects = {name: getattr(sys, name) for name in _STREAMS}
    closed = {name: getattr(each, "closed", True) for name, each in objects.items()}
    kept: dict[int, int] = {}
    for number in _STREAMS.values():
        with contextlib.suppress(OSError):
            kept[number] = os.dup(number)

    def restore() -> None:
        for number, copy in kept.items():
            if _file_of(number) != _file_of(copy):
                os.dup2(copy, number)
            os.close(copy)
        for name, before in objects.items():
            if getattr(before, "closed", True) and not closed[name]:
                before = open(  # noqa: SIM115
                    _STREAMS[name], "r" if name == "stdin" else "w", closefd=False,
                    encoding=getattr(before, "encoding", None), errors=getattr(before, "errors", None),
                )  # fmt: skip
            setattr(sys, name, before)

    return restore


def _file_of(number: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _signals() -> _Restore:
    if threading.current_thread() is not threading.main_thread():
        return lambda: None  # Python lets only the main thread change them
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)

    return restore


def _torch_settings() -> _Restore:
    torch = _torch()
    if torch is None:
        return lambda: None
    settings: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    ]
    before = [(read(), read, write) for read, write in settings]
    threads, device = torch.get_num_threads(), torch.get_default_device()

    def restore() -> None:
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        for value, read, write in before:
            if read() != value:
                write(value)
        torch.set_num_threads(threads)  # always: the number that a thread reads may not be that of all

    return restore


def _torch_random(seed: int) -> _Restore:
    torch = _torch()
    if torch is None:
        return lambda: None
    state = torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    if torch.cuda.is_available() or torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # quicker: the former formats the stack at every call, for the day when a device may appear
        torch.default_generator.manual_seed(seed)

    def restore() -> None:
        torch.set_rng_state(state)
        if on_cuda:
            torch.cuda.set_rng_state_all(on_cuda)

    return restore


def _torch() -> Any:
    """The module torch if it has been imported, and not only in part."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "get_rng_state") else None
