"""Graceful stop: Ctrl-C and SIGTERM end a run after the current step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass
class Stop:
    """A request to stop, set by a signal handler and read between steps."""

    requested: bool = False


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_before: dict[int, Any] = {}
"""Handlers that the graceful stop in force has replaced."""


@contextmanager
def graceful_stop(note: Callable[[str], None]) -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; a second Ctrl-C raises KeyboardInterrupt as usual.

    A process that a user's code forks (`multiprocessing.Pool` in a reward) dies of SIGTERM as usual, and ignores Ctrl-C, which
    a terminal sends to all: the step that we finish may need it.

    Args:
        note: logs a line.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python handles signals in the main thread only
        return

    def request(number: int, frame: FrameType | None) -> None:
        again, stop.requested = stop.requested, True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # a handler that interrupts a write to the same file must not write; the step matters more than the message
        with suppress(RuntimeError, OSError):
            if not again:
                note("finishing this step; Ctrl-C again stops at once")

    # None: a handler that is not Python's
    before: dict[int, Any] = {
        number: signal.signal(number, request) or signal.SIG_DFL for number in _SIGNALS
    }
    _before.update(before)
    try:
        yield stop
    finally:
        _before.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def handlers_from_before() -> Iterator[None]:
    """Put the handlers back that the graceful stop in force has replaced, while the caller of a run does other work."""
    replaced = dict(_before) if threading.current_thread() is threading.main_thread() else {}
    ours = {number: signal.signal(number, handler) for number, handler in replaced.items()}
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


_masks = threading.local()
"""Per thread that forks: the signals that it had blocked before."""


def _hold_signals() -> None:
    """Before a fork: block the signals of the graceful stop. Python drops those that reach a child before its first line."""
    if _before:
        _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _release_signals() -> None:
    """After a fork, in parent and child: deliver what came meanwhile."""
    if (mask := _masks.__dict__.pop("before", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _leave_signals_to_parent() -> None:
    """In a forked child: take the handlers of the graceful stop away, and that of a library (Ray's) with them."""
    if _before:
        ignored = _before[signal.SIGTERM] == signal.SIG_IGN
        signal.signal(signal.SIGTERM, signal.SIG_IGN if ignored else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _before.clear()
    _release_signals()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_hold_signals, after_in_parent=_release_signals, after_in_child=_leave_signals_to_parent
    )
