"""A test finds its process as the first one did: what a test sets is put back (leftovers.py, conftest.py)."""

from __future__ import annotations

import gc
import logging
import os
import random
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepgrpo.loading import load_object

library = logging.getLogger("some.library")


def umask() -> int:
    """It can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


READ: dict[str, Callable[[], Any]] = {
    "threads": torch.get_num_threads, "dtype": torch.get_default_dtype, "gradients": torch.is_grad_enabled,
    "precision": torch.get_float32_matmul_precision, "anomalies": torch.is_anomaly_enabled,
    "determinism": torch.get_deterministic_debug_mode, "device": torch.get_default_device,
    "draws": lambda: (random.random(), np.random.random(), torch.rand(1, device="cpu").item()),
    "directory": lambda: len(list(Path.cwd().iterdir())), "home": lambda: os.environ.get("HOME") == f"{os.getcwd()}/home",
    "variable": lambda: os.environ.get("LEFT"), "umask": umask,
    "signals": lambda: [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
    "recursion": sys.getrecursionlimit, "digits": sys.get_int_max_str_digits, "timeout": socket.getdefaulttimeout,
    "garbage": gc.isenabled, "path": lambda: list(sys.path), "hook": lambda: sys.excepthook,
    "logging": lambda: (logging.root.manager.disable, logging.getLogger("deepgrpo").level, library.level),
    "handlers": lambda: [type(each).__name__ for each in logging.root.handlers],
    "file size": lambda: resource.getrlimit(resource.RLIMIT_FSIZE),
    "modules": lambda: [n for n in sys.modules if n == "left_behind" or n.startswith("deepgrpo_user_left")],
}  # fmt: skip


def disturb() -> None:
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_float32_matmul_precision("medium")
    torch.autograd.set_detect_anomaly(True)
    torch.use_deterministic_algorithms(True)
    torch.set_default_device("meta")
    for name in ("left_user.py", "left_behind.py"):
        Path(name).write_text("def value(): pass\n")
    load_object("left_user.py:value", "a value")
    sys.path.insert(0, os.getcwd())
    __import__("left_behind")
    os.environ["LEFT"] = os.environ["HOME"] = "/nowhere"
    os.umask(0o777)
    os.chdir("/")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    sys.setrecursionlimit(5000)
    sys.set_int_max_str_digits(0)
    socket.setdefaulttimeout(7.0)
    gc.disable()
    sys.excepthook = print  # type: ignore[assignment]
    logging.disable()
    logging.root.addHandler(logging.NullHandler())
    for each in (logging.getLogger("deepgrpo"), library):
        each.setLevel(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


found: dict[str, Any] = {}


@pytest.mark.parametrize("turn", ["one", "another"])
def test_both_find_the_same(turn: str) -> None:
    now = {name: read() for name, read in READ.items()}
    assert now["home"] and now["directory"] == 0 and not now["modules"] and now["threads"] == 1
    if found:
        assert now == found
    found.update(now)
    disturb()
    left = {name: read() for name, read in READ.items() if name != "directory"}
    assert not [name for name, value in left.items() if value == found[name]]  # each line above changes something
