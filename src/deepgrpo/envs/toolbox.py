"""Tools in worker processes: a user's functions, called with a time, a memory and an output limit.

    calls ─► worker (loads the functions once) ─► Result each: a text for the model, and whether the call failed

A call that hangs, ends its process, raises, has wrong arguments or returns too much is a text that says so. What a function
prints is dropped. `random` and numpy's global stream are seeded by the call, so a function that draws gives the same result
whenever the same call is made.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import ValidationError, validate_call
from pydantic.errors import PydanticUserError

from deepgrpo import rng
from deepgrpo.envs.calls import Call
from deepgrpo.errors import ConfigError, EnvError
from deepgrpo.loading import load_objects
from deepgrpo.workers import Failure, Workers, limit_memory

KEY = "env.functions"
_SAID = 300
"""Characters of an exception's message that the model sees."""


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a tool call. Example: Result("7", failed=False, seconds=0.002)."""

    text: str
    failed: bool
    seconds: float = 0.0


class Toolbox:
    """The functions of a recipe. Workers start with the first call."""

    def __init__(self, functions: str, *, timeout_s: float, memory_mb: int, output_chars: int, workers: int) -> None:
        """Load the functions, to describe them.

        Args:
            functions: "path/to/file.py:[search, calculator]".
            timeout_s: seconds of a call.
            memory_mb: memory that a call may take.
            output_chars: characters of a result; longer ones are cut.
            workers: processes, which work side by side.

        Raises ConfigError if a function cannot be loaded, or has no types or no documentation.
        """
        loaded = load_objects(functions, KEY)
        self.schemas = [schema_of(name, function) for name, function in loaded.items()]
        self._names = list(loaded)
        self._timeout, self._limit = timeout_s, output_chars
        origin = functions.rpartition(":")[0]
        here = os.path.abspath(os.path.expanduser(origin)) if origin.endswith(".py") else origin
        prepare = partial(_prepare, f"{here}:[{','.join(loaded)}]", memory_mb << 20)
        self._workers = Workers(KEY, prepare, "deepgrpo.envs.toolbox", EnvError, count=workers, timeout_s=timeout_s)

    def call(self, calls: Sequence[Call]) -> list[Result]:
        """Make calls side by side. Raises EnvError if no worker can be started."""
        known = [i for i, call in enumerate(calls) if call.name in self._names]
        jobs = [partial(_call, calls[i].name, calls[i].arguments, self._limit) for i in known]
        found = {i: self._outcome(calls[i], done) for i, done in zip(known, self._workers.run(jobs), strict=True)}
        return [found[i] if i in found else unknown(call, self._names) for i, call in enumerate(calls)]

    def close(self) -> None:
        """Stop the workers."""
        self._workers.close()

    def _outcome(self, call: Call, done: Result | Failure) -> Result:
        if isinstance(done, Result):
            return done
        if done.problem == "timeout":
            return Result(f"error: {call.name} did not answer within {self._timeout:g} seconds", True, self._timeout)
        said = "ended its process" if done.problem == "crash" else f"raised {done.said}"
        return Result(clean(f"error: {call.name} {said}"), True)


def schema_of(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """JSON schema of a function by its types and its docstring. Raises ConfigError if it lacks one of them."""
    from transformers.utils import get_json_schema

    try:
        found: dict[str, Any] = get_json_schema(function)
    except Exception as error:  # DocstringParsingException, TypeHintParsingException, or of odd annotations
        raise ConfigError(
            f"{KEY} names {name!r}, which cannot be shown to the model: {error}; give it a type for each argument, and a "
            "docstring that describes it and has a line for each argument under `Args:`"
        ) from error
    return found


def typed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments checked and converted by their types, where pydantic knows these."""
    try:
        return validate_call(function)
    except PydanticUserError:
        return function


def unknown(call: Call, names: Sequence[str]) -> Result:
    """Result of a call of a tool that there is not."""
    return Result(clean(f"error: there is no tool {call.name[:80]!r}; the tools are {', '.join(names)}"), True)


def result_of(function: Callable[..., Any], name: str, arguments: str, limit: int) -> Result:
    """Call a `typed` function in this process.

    Args:
        arguments: a JSON object.
        limit: longest result in characters.
    """
    began = time.perf_counter()
    text, failed = _answer(function, name, arguments)
    if len(text) > limit:
        text, failed = f"{text[:limit]}\n[cut here: {len(text):,} characters, {limit:,} are shown]", True
    return Result(clean(text), failed, time.perf_counter() - began)


def clean(text: str) -> str:
    """The text without halves of characters, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


# ---------------------------------------------------------------- in a worker process

_functions: dict[str, Callable[..., Any]] = {}


def _prepare(functions: str, memory: int) -> None:
    """Load the functions; what they print, and what they read from the terminal, is nothing."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    _functions.update({name: typed(function) for name, function in load_objects(functions, KEY).items()})
    limit_memory(memory)


def _call(name: str, arguments: str, limit: int) -> Result:
    seed = rng.key("tool", name, arguments)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
    return result_of(_functions[name], name, arguments, limit)


def _answer(function: Callable[..., Any], name: str, arguments: str) -> tuple[str, bool]:
    try:
        found = function(**json.loads(arguments))
        if inspect.isawaitable(found):
            found = asyncio.run(_wait(found))
        return _shown(found), False
    except ValidationError as error:
        found = error.errors(include_url=False)[:3]
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in found)
        return f"error: {name}: {problems[:_SAID]}", True
    except (Exception, SystemExit) as error:
        return f"error: {name} raised {type(error).__name__}: {_said(error)}", True


async def _wait(found: Any) -> Any:
    return await found


def _said(error: BaseException) -> str:
    try:
        return str(error)[:_SAID]
    except Exception:  # an exception of the user's own that fails to say what it is
        return ""


def _shown(found: Any) -> str:
    """A result as text: strings and bytes as they are, everything else as JSON where it is JSON."""
    if isinstance(found, str):
        return found
    if isinstance(found, bytes | bytearray):
        return bytes(found).decode(errors="replace")
    try:
        return json.dumps(found, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(found)
