"""Graceful stop: Ctrl-C and SIGTERM end a run after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """A request to stop, set by a signal handler and read between steps."""

    requested: bool = False


@contextmanager
def graceful_stop(note: Callable[[str], None]) -> Iterator[Stop]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; a second Ctrl-C raises KeyboardInterrupt as usual.

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

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
