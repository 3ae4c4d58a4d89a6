"""Files of a data path: one file, the shards in a directory, or those that match a pattern such as `data/train-*.parquet`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from deepgrpo.errors import DataError

_ENDING = re.compile(r"\.(jsonl|json|parquet)(\.gz)?$")
_SPLIT = re.compile(r"(.+?)[-_.]\d+-of-\d+\b")


def files_of(name: str, endings: Sequence[str]) -> list[Path]:
    """The files of a data path, in the order of their names.

    Args:
        name: a file of any ending, a directory, or a pattern.
        endings: endings of the files that count in a directory, such as ".jsonl".

    Raises DataError: nothing is there, a file may not be read, or a directory has shards of several splits.
    """
    try:
        path = Path(name).expanduser()
        is_directory, is_there = path.is_dir(), path.exists()
        place = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL in it, a user that does not exist
        raise DataError(f"data.path {name[:80]!r} is no name of a file: {error}; correct it") from None
    if is_directory:
        return _in_directory(path, name, endings)
    if not is_there and glob.has_magic(name):
        found = [Path(each) for each in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(each)]
        if not found:
            raise DataError(
                f"data.path {name!r} matches no file (looked for {place}); a relative path starts where you run"
            )
    elif not is_there:
        raise DataError(f"data.path {name!r} does not exist (looked for {place}); a relative path starts where you run")
    else:
        found = [path]
    for each in found:
        if not os.access(each, os.R_OK):
            raise DataError(
                f"data.path {str(each) if len(found) > 1 else name!r} may not be read; change its permissions"
            )
    return found


def _in_directory(path: Path, name: str, endings: Sequence[str]) -> list[Path]:
    if is_saved(path):
        raise DataError(f'data.path {name!r} is a folder of `save_to_disk`; set data.type = "hf"')
    found = sorted(each for each in path.iterdir() if each.name.endswith(tuple(endings)) and each.is_file())
    if not found:
        raise DataError(f"data.path {name!r} is a directory; name a file in it, or a directory with {endings[0]} files")
    splits = sorted({match[1] for each in found if (match := _SPLIT.match(each.name))})
    if len(splits) > 1:
        raise DataError(
            f"data.path {name!r} has shards of several splits ({', '.join(splits)}); name those of one, e.g. "
            f'data.path = "{os.path.join(name, splits[-1])}-*"'
        )
    return found


def is_saved(path: Path) -> bool:
    """True for a folder that `datasets` wrote with `save_to_disk`."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def names_of(files: Sequence[Path]) -> list[str]:
    """Short names that tell the files of a source apart, for ids: below the directory that they share, without endings."""
    shared = os.path.commonpath([file.parent for file in files])
    paths = [os.path.relpath(file, shared) for file in files]
    short = [_ENDING.sub("", path) for path in paths]
    return short if len(set(short)) == len(short) else paths
