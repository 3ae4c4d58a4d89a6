"""Functions of test files, called in processes that have the pretended device.

Importing torch and transformers takes five seconds of a processor, and the pretended device cannot be taken away again. So a
fork of the process that waits for commands (commands.py) imports the rest and waits, a second one, its fork, installs the
device and waits as well. Each call is a fork of the second (or of the first: for the results of the CPU), and its answer goes
back as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import inspect
import io
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from commands import Command, Starter, request

MODULES = (
    "torch._dynamo.device_interface", "deepgrpo.train.loop", "deepgrpo.eval.command", "deepgrpo.lab.model_check",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2", "safetensors.torch",
)  # fmt: skip


class Server:
    """The waiting process."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        link = socket.socket(socket.AF_UNIX)
        link.connect(Starter().address)
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with theirs:
            request("pretend.server", (), Path.cwd(), environ, link, (theirs.fileno(), 2))
        self._lines = self._ours.makefile("rw")
        self._process = Command(link, self._lines, self._lines)

    def call(self, file: str, name: str, device: str, arguments: dict[str, Any]) -> Any:
        """What the function returns. Raises AssertionError with the child's traceback."""
        asked = {"file": file, "name": name, "device": device, "arguments": arguments, "cwd": os.getcwd()}
        print(json.dumps(asked), file=self._lines, flush=True)
        answer = json.loads(self._lines.readline() or '{"error": "the process with the pretended device has died"}')
        assert "error" not in answer, f"{name} on {device}:\n{answer['error']}"
        return answer["result"]

    def close(self) -> None:
        """Both waiting processes end with their input."""
        self._lines.close()
        self._ours.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.close()


def on_device(test: Callable[..., None]) -> Callable[..., None]:
    """A test that runs on the pretended device. Its arguments are plain values; there are no fixtures but `server`."""

    @functools.wraps(test)
    def wrapper(server: Server, **arguments: Any) -> None:
        server.call(inspect.getfile(test), test.__name__, "cuda", arguments)

    own = list(inspect.signature(test).parameters.values())
    wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("server", inspect.Parameter.POSITIONAL_OR_KEYWORD), *own]
    )
    return wrapper


# ---------------------------------------------------------------- in the waiting process and its children


def serve() -> None:
    """Import everything, fork once for the pretended device, and answer line by line."""
    given = socket.socket(fileno=os.dup(1))
    os.dup2(2, 1)
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()
    ours, theirs = socket.socketpair()
    if not os.fork():
        ours.close()
        given.close()
        from pretend import device

        device.install()
        with theirs.makefile("rw") as link:
            for line in link:
                print(_forked(line), file=link, flush=True)
        os._exit(0)
    theirs.close()
    with given.makefile("rw") as lines, ours.makefile("rw") as link:
        for line in lines:
            if json.loads(line)["device"] == "cuda":
                print(line, end="", file=link, flush=True)
                answer = link.readline().strip()
            else:
                answer = _forked(line)
            print(answer, file=lines, flush=True)
    ours.close()
    os.wait()


def _forked(line: str) -> str:
    """The answer to one line, by a child."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        _answer(json.loads(line), writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    return answer or json.dumps({"error": f"the process ended with status {status}"})


def _answer(asked: dict[str, Any], pipe: int) -> None:
    code = 70
    try:
        output = io.StringIO()
        try:
            os.chdir(asked["cwd"])
            import torch

            torch.set_num_threads(1)
            with contextlib.redirect_stdout(output):
                found = _function(asked["file"], asked["name"])(**asked["arguments"])
            answer = json.dumps({"result": found})
        except BaseException:
            answer = json.dumps({"error": traceback.format_exc() + output.getvalue()[-2000:]})
        with os.fdopen(pipe, "w") as out:
            out.write(answer)
        code = 0
    finally:
        os._exit(code)


def _function(file: str, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name)
    return getattr(function, "__wrapped__", function)  # type: ignore[no-any-return]


if __name__ == "__main__":
    serve()
