"""A user's own function or class, loaded from a file or an installed package.

A recipe names it as "path/to/file.py:name" or "package.module:name"; rewards, strategies, segmenters and losses all load
theirs here. A relative path starts in the working directory. A file is run anew each time it is named.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import reprlib
import sys
import traceback
from pathlib import Path
from typing import Any

from deepgrpo import rng
from deepgrpo.config.base import GIVEN
from deepgrpo.errors import ConfigError, first_line
from deepgrpo.foreign import unchanged_process

_numbers = itertools.count()
"""Numbers of the files loaded by this process."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def load_object(reference: str, key: str) -> Any:
    """Load the function or class that `reference` names.

    Args:
        reference: "package.module:name" or "path/to/file.py:name"; the name may have dots (`Class.method`).
        key: the key of the recipe it comes from, for messages, e.g. "reward.function".

    Raises ConfigError: the form is wrong, the file, the module or the name is missing, importing it fails, or the object
    cannot be called, or was an object of another process.
    """
    if reference.startswith(GIVEN):
        raise not_given(key, reference.removeprefix(GIVEN))
    origin, colon, attribute = reference.rpartition(":")
    if not colon or not origin or not attribute:
        raise ConfigError(
            f'{key} is {reference!r}; write "package.module:name" or "path/to/file.py:name", with a colon before the name'
        )
    return _attribute(_load(origin, reference, key), origin, attribute, f"{key} is {reference!r}, but")


def load_objects(reference: str, key: str) -> dict[str, Any]:
    """Load several functions of one file or module, by name: "path/to/file.py:[search, calculator]" or "file.py:search".

    The file is run once. Raises ConfigError like `load_object`, also if a name stands there twice.
    """
    origin, colon, listed = reference.rpartition(":")
    names = [name.strip() for name in listed.strip().removeprefix("[").removesuffix("]").split(",")]
    if not colon or not origin or not all(names) or (len(names) > 1) > listed.strip().startswith("["):
        raise ConfigError(
            f'{key} is {reference!r}; write "path/to/file.py:[name, other_name]" or "package.module:[name]", with a colon '
            "before the names"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{key} is {reference!r}, which names {twice[0]!r} twice; remove one of the two")
    module = _load(origin, reference, key)
    return {name: _attribute(module, origin, name, f"{key} names {name!r}, but") for name in names}


def _load(origin: str, reference: str, key: str) -> Any:
    said = f"{key} is {reference!r}, but"
    with unchanged_process(rng.key(reference)):
        return _load_file(origin, said) if origin.endswith(".py") else _load_module(origin, said)


def _attribute(module: Any, origin: str, attribute: str, said: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        problem = "does not have it" if found is None else f"has it as {show(found)}, which cannot be called"
        raise ConfigError(f"{said} {origin} {problem}; it has {', '.join(public) or 'no function or class at all'}")
    return found


def not_given(key: str, name: str) -> ConfigError:
    """The error about an object that a recipe only names."""
    return ConfigError(
        f"{key}: {name} was an object of the Python program that started the run, and no file has it; name another, or "
        "continue the run in Python, with the same objects: deepgrpo.train(resume=RUN, ...)"
    )


def show(value: Any) -> str:
    """The start of a value's repr and its type, for a message."""
    try:
        text = _SHORT.repr(value)
    except Exception:  # a repr of the user's own that fails, or a number of too many digits
        text = "something without a repr"
    return f"{text[:60]}{'...' if len(text) > 60 else ''} (a {type(value).__name__})"


def where(error: BaseException) -> str:
    """The error, with the file and the line that raised it: `KeyError: 'x' (/home/me/mine.py, line 12)`."""
    place = place_in(error, None)
    return f"{type(error).__name__}: {first_line(error)}" + (f" ({place})" if place else "")


def place_in(error: BaseException, file: str | None) -> str:
    """The deepest line of a file in an error's traceback, `/home/me/mine.py, line 12`; without one the deepest of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file] or frames
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else ""


def file_of(function: Any) -> str | None:
    """The file that defines a user's function, None if it has none."""
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    own = getattr(function, "__func__", function)
    for each in (own, type(own).__call__):  # a function or method; an object that can be called
        code = getattr(each, "__code__", None)
        if code is not None:
            return str(code.co_filename)
    return None


def _load_file(origin: str, said: str) -> Any:
    try:
        path = Path(origin).expanduser().resolve()
        missing, folder = not path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long; ~nobody; a null byte
        raise ConfigError(f"{said} that path cannot be used: {first_line(error)}") from error
    if folder:
        raise ConfigError(f"{said} {str(path)!r} is a directory; name a file in it")
    if missing:
        raise ConfigError(f"{said} the file {str(path)!r} does not exist; a relative path starts where you run")
    # a name of its own each time: two files called reward.py do not meet, a file math.py hides no module, and a function keeps
    # the module from which worker processes unpickle it. Registered, as dataclasses need it
    name = f"deepgrpo_user_{path.stem}_{next(_numbers)}"
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
        raise ConfigError(f"{said} running the file failed: {where(error)}; {_remedy(error, path)}") from error
    return module


def _remedy(error: BaseException, path: Path) -> str:
    wanted = (error.name or "").split(".")[0] if isinstance(error, ImportError) else ""
    relative = isinstance(error, ImportError) and "relative import" in str(error)
    if relative or (wanted and any((path.parent / each).exists() for each in (wanted, f"{wanted}.py"))):
        return (
            f"a file is loaded alone: put its folder on the path, PYTHONPATH={path.parent}, and import the modules beside it "
            "by their plain names"
        )
    return "correct it"


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
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{said} importing {origin} failed: {where(error)}; correct it") from error
