"""Settings of the process restored after every test: no test may depend on those before it.

pytest itself puts back warnings' filters and standard streams, `monkeypatch` what goes through it, and the fixture in
conftest.py the directory and the environment.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Restore = Callable[[], None]

LIMITS = ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CORE")


def restorer(own: Path) -> Restore:
    """Note the settings of this process; the function that puts them back.

    Args:
        own: the test's directory: modules from below it are forgotten again.
    """
    parts = [_torch(), _interpreter(), _signals(), _logging(), _modules(own), _limits()]

    def restore() -> None:
        for each in parts:
            each()

    return restore


def seed_everything() -> None:
    """Start every test with the same random state."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    # without a device, torch.manual_seed formats the stack for each kind of device
    (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(0)


def _setting(read: Callable[[], Any], write: Callable[[Any], Any]) -> Restore:
    before = read()

    def restore() -> None:
        if read() != before:
            write(before)

    return restore


def _together(*parts: Restore) -> Restore:
    return lambda: [each() for each in parts] and None


def _torch() -> Restore:
    import torch

    threads, device = torch.get_num_threads(), torch.get_default_device()
    settings = _together(
        _setting(torch.get_default_dtype, torch.set_default_dtype),
        _setting(torch.is_grad_enabled, torch.set_grad_enabled),
        _setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        _setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        _setting(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    )

    def restore() -> None:
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        settings()
        torch.set_num_threads(threads)  # always: the number that this thread reads need not be that of all

    return restore


def _interpreter() -> Restore:
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    hook, path = sys.excepthook, list(sys.path)

    def restore() -> None:
        os.umask(mask)
        sys.excepthook = hook
        sys.path[:] = path

    return _together(
        restore,
        _setting(sys.getrecursionlimit, sys.setrecursionlimit),
        _setting(sys.get_int_max_str_digits, sys.set_int_max_str_digits),
        _setting(socket.getdefaulttimeout, socket.setdefaulttimeout),
        _setting(gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    )


def _signals() -> Restore:
    return _together(*(
        _setting(lambda number=number: signal.getsignal(number), lambda handler, number=number: signal.signal(number, handler))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP, signal.SIGPIPE)
        if signal.getsignal(number) is not None  # a handler of C code cannot be put back
    ))  # fmt: skip


def _loggers() -> list[logging.Logger]:
    return [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]


def _logging() -> Restore:
    """Levels of all loggers; handlers of the root and ours only, as libraries add theirs once, when they are first used."""

    def ours(loggers: list[logging.Logger]) -> list[logging.Logger]:
        return [each for each in loggers if each.name.split(".")[0] in ("root", "deepgrpo")]

    before = _loggers()
    levels = [(each.level, each.disabled) for each in before]
    handlers = {each.name: (each.level, list(each.handlers), each.propagate) for each in ours(before)}
    disabled = logging.root.manager.disable

    def restore() -> None:
        if logging.root.manager.disable != disabled:
            logging.disable(disabled)  # looks through all loggers
        if [(each.level, each.disabled) for each in before] != levels:
            for logger, (level, off) in zip(before, levels, strict=True):
                if logger.level != level:
                    logger.setLevel(level)
                logger.disabled = off
        for logger in ours(_loggers()):
            level, logger.handlers[:], logger.propagate = handlers.get(logger.name, (logging.NOTSET, [], True))
            if logger.level != level:
                logger.setLevel(level)

    return restore


def _modules(own: Path) -> Restore:
    before = sys.modules.copy()  # a tenth of the time of a set

    def restore() -> None:
        if len(sys.modules) == len(before) and next(reversed(sys.modules)) == next(reversed(before)):
            return  # a module that is imported, or once more, is the last one
        for name in sys.modules.keys() - before.keys():
            file = getattr(sys.modules[name], "__file__", None)
            if name.startswith("deepgrpo_user_") or (isinstance(file, str) and file.startswith(f"{own}{os.sep}")):
                del sys.modules[name]

    return restore


def _limits() -> Restore:
    with contextlib.suppress(ImportError):  # not on every system
        import resource

        numbers = [getattr(resource, name) for name in LIMITS]
        return _together(*(
            _setting(lambda n=n: resource.getrlimit(n), lambda pair, n=n: resource.setrlimit(n, pair)) for n in numbers
        ))  # fmt: skip
    return lambda: None
