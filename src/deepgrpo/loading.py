"""A user's own function or class, loaded from a file or an installed package.

A recipe names it as "path/to/file.py:name" or "package.module:name"; rewards, strategies, segmenters and losses all load
theirs here. A relative path starts in the working directory. A file is run anew each time it is named.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

from deepgrpo import rng
from deepgrpo.errors import ConfigError


def load_object(reference: str, key: str) -> Any:
    """Load the function or class that `reference` names.

    Args:
        reference: "package.module:name" or "path/to/file.py:name"; the name may have dots (`Class.method`).
        key: the key of the recipe it comes from, for messages, e.g. "reward.function".

    Raises ConfigError: the form is wrong, the file, the module or the name is missing, importing it fails, or the object
    cannot be called.
    """
    origin, colon, attribute = reference.rpartition(":")
    if not colon or not origin or not attribute:
        raise ConfigError(
            f'{key} is {reference!r}; write "package.module:name" or "path/to/file.py:name", with a colon before the name'
        )
    said = f"{key} is {reference!r}, but"
    module = _load_file(origin, said) if origin.endswith(".py") else _load_module(origin, said)
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        problem = "does not have it" if found is None else f"has it as {show(found)}, which cannot be called"
        raise ConfigError(f"{said} {origin} {problem}; it has {', '.join(public) or 'no function or class at all'}")
    return found


def show(value: Any) -> str:
    """The start of a value's repr and its type, for a message."""
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} (a {type(value).__name__})"


def where(error: BaseException) -> str:
    """The error, with the file and the line that raised it: `KeyError: 'x' (/home/me/mine.py, line 12)`."""
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    line = f" ({frame[0].filename}, line {frame[0].lineno})" if frame else ""
    return f"{type(error).__name__}: {error}{line}"


def _load_file(origin: str, said: str) -> Any:
    path = Path(origin).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"{said} the file {str(path)!r} does not exist; a relative path starts where you run")
    # named after its path, so that two files called reward.py do not meet, and registered, as dataclasses need it
    name = f"deepgrpo_user_{path.stem}_{rng.key(str(path)):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a .py file always has a spec and a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ConfigError(f"{said} running the file failed: {where(error)}; correct it") from error
    return module


def _load_module(origin: str, said: str) -> Any:
    try:
        return importlib.import_module(origin)
    except ModuleNotFoundError as error:
        if error.name is not None and (origin == error.name or origin.startswith(error.name + ".")):
            raise ConfigError(
                f"{said} there is no module {error.name!r}; install it, add its folder to PYTHONPATH, or name a file: "
                '"path/to/file.py:name"'
            ) from None
        raise ConfigError(f"{said} importing {origin} failed: {where(error)}; correct it") from error
    except Exception as error:
        raise ConfigError(f"{said} importing {origin} failed: {where(error)}; correct it") from error
