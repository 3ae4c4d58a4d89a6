"""One call of a user's function under a time limit.

    main thread ──► thread: the call, and reading of what it returned ──► result, or the error as a RewardError
        waits at most `timeout_s`; Ctrl-C is heard meanwhile

    after the limit                    outcome
    Python code (`while True: pass`)   an exception ends the thread
    sleep, a blocking read             the thread is left, and ends with the process
    C code that never lets Python run  `witness` ends the process after `GRACE_S` more, and says where it was

The call runs in a daemon thread, so an alarm or a signal handler of the user's code is refused by Python.
"""

from __future__ import annotations

import ctypes
import os
import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

from deepgrpo.errors import RewardError, first_line
from deepgrpo.foreign import exit_code, leave_if_forked, unchanged_process
from deepgrpo.loading import place_in
from deepgrpo.rewards.witness import Witness

GRACE_S = 10.0
"""Seconds beyond the limit after which a call that holds the interpreter ends the process."""

T = TypeVar("T")


class _Abandoned(SystemExit):
    """Ends the thread of a call that has exceeded its limit; a SystemExit ends a thread without a message."""


def call_within(
    timeout_s: float, work: Callable[[], T], *, name: str, file: str | None, count: int, seed: int, witness: Witness
) -> T:
    """Do some work in a thread of its own and return its result.

    Args:
        timeout_s: limit in seconds.
        work: calls the function `name`, and reads what it returned.
        file: file of the function, whose line a message names.
        count: number of responses, for the message.
        seed: of torch's random stream during the call.
        witness: tells the user if the process does not survive the call.

    Raises RewardError: the work raised, or exceeded the limit.
    """
    done: list[T] = []
    failure: list[RewardError] = []
    owner = os.getpid()

    def run() -> None:
        code = 0
        try:
            done.append(work())
        except RewardError as error:
            failure.append(error)
        except BaseException as error:  # SystemExit too, which a thread would swallow
            code = exit_code(error) if isinstance(error, SystemExit) else 1
            if os.getpid() == owner:
                failure.append(_raised(name, file, error))
        leave_if_forked(owner, code)

    thread = threading.Thread(target=run, name="deepgrpo-reward", daemon=True)
    with unchanged_process(seed), witness.watching(timeout_s + GRACE_S):
        thread.start()
        thread.join(timeout_s)
    if failure:
        raise failure[0]
    if not done:
        _abandon(thread)
        raise RewardError(
            f"the reward function {name!r} did not return within reward.timeout_s = {timeout_s:g} s for "
            f"{count} responses; make it faster or raise reward.timeout_s"
        )
    return done[0]


def _raised(name: str, file: str | None, error: BaseException) -> RewardError:
    tail = "".join(traceback.format_exception(error, limit=-2, chain=False)[1:]).rstrip()
    hint = "let it return None for what it cannot score"
    if isinstance(error, ValueError) and "main thread" in str(error):
        hint = "use reward.timeout_s in place of signals and alarms, which Python allows in the main thread only"
    found = RewardError(
        f"the reward function {name!r} raised {type(error).__name__}: {first_line(error)} ({place_in(error, file)}); correct "
        f"the function, or {hint}. The end of the traceback:\n{tail[-2000:]}"
    )
    found.__cause__ = error
    return found


def _abandon(thread: threading.Thread) -> None:
    """Raise an exception in a thread; it ends as soon as it executes Python code."""
    if thread.ident is not None and thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Abandoned))
