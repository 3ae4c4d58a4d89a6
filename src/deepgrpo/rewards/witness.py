"""A small process that tells the user why a run ended inside a reward function, when the run itself no longer can.

    run ──► marks around each call, and the stack if a call holds the interpreter for too long ──► witness ──► standard error

A call that leaves by `os._exit`, crashes in C code or is killed ends the whole process; so does `faulthandler`, when C code has
held the interpreter beyond the limit. The witness waits, without cost, and ends with the run.

This file is also the witness's own program: it imports the standard library only.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator

_BEGIN, _END, _LEAVE = b"\x01", b"\x02", b"\x03"
_POLL_S = 0.5
_LEAVE_S = 5.0
_GO_ON = "a training run goes on from its last checkpoint: deepgrpo train --resume RUN, or deepgrpo.train(resume=RUN, ...)"


class Witness:
    """Parent side. The process starts with the first call.

    Args:
        name: the reward function, for the message.
        file: its file, whose line the message names.
    """

    def __init__(self, name: str, file: str | None) -> None:
        self._name, self._file = name, file
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def watching(self, limit_s: float) -> Iterator[None]:
        """Watch one call. Beyond the limit this process ends with exit code 1, even if no Python code can run."""
        pipe = self._pipe()
        if pipe is None:
            yield
            return
        with contextlib.suppress(OSError):
            os.write(pipe, _BEGIN)
        faulthandler.dump_traceback_later(limit_s, exit=True, file=pipe)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(OSError):
                os.write(pipe, _END)

    def close(self) -> None:
        """End the process; closing twice does nothing."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            # in words: children that the user's code forked keep the pipe open
            with contextlib.suppress(OSError):
                os.write(process.stdin.fileno(), _LEAVE)
            process.stdin.close()
            try:
                process.wait(_LEAVE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _pipe(self) -> int | None:
        """The pipe to the witness; None if it cannot be started (no memory, too many processes)."""
        if self._process is None or self._process.poll() is not None:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", __file__, self._name, self._file or ""], stdin=subprocess.PIPE, bufsize=0,
                    stdout=subprocess.DEVNULL, process_group=0,
                )  # fmt: skip
            except OSError:
                return None
        assert self._process.stdin is not None
        return self._process.stdin.fileno()


# ---------------------------------------------------------------- the witness's own program


def witness(name: str, file: str) -> str | None:
    """Wait for the end of the parent. Returns what to say about it; None if no call was under way."""
    parent, seen = os.getppid(), b""
    while True:
        if select.select([0], [], [], _POLL_S)[0]:
            got = os.read(0, 1 << 16)
            if got.endswith(_LEAVE):
                return None
            if not got:
                break
            seen += got
            seen = seen[max(seen.rfind(_BEGIN), 0) :]
            if _END in seen:
                seen = b""
        elif os.getppid() != parent:
            break
    if not seen:
        return None
    stack = seen.removeprefix(_BEGIN).decode(errors="replace")
    if not stack:
        return (
            f"the process ended inside the reward function {name!r}: it called os._exit, crashed in C code, or was killed "
            f"(no memory?); {_GO_ON}"
        )
    return (
        f"the reward function {name!r} exceeded reward.timeout_s in code that lets no other thread run "
        f"({_place(stack, file)}), so the process was ended; {_GO_ON}"
    )


def _place(stack: str, file: str) -> str:
    """The innermost line of the user's file in the stacks of all threads, innermost first; else the innermost of all."""
    frames = re.findall(r'File "(.*)", line (\d+)', stack)
    own = [frame for frame in frames if frame[0] == file] or frames
    return f"{own[0][0]}, line {own[0][1]}" if own else "place unknown"


if __name__ == "__main__":
    said = witness(*sys.argv[1:3])
    if said:
        print(f"error: {said}", file=sys.stderr)
