"""Writes that survive a kill and a full disk, deletions that leave no half, and the remedy for a refusal of the system."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

WRITING, DELETING = ".tmp-", ".old-"
"""Prefixes of what is being written and of what is being deleted; a kill leaves such names, the next start removes them."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Codes of a full disk. A write that fails with them does not say which file it was."""

_REMEDIES = {
    **dict.fromkeys(FULL, "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "fix its permissions"),
    errno.EROFS: "make its file system writable",
    errno.ENOENT: "put back what was removed",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "move away the file that is there in place of a directory"),
    errno.EISDIR: "move away the directory that is there in place of a file",
    errno.ELOOP: "mend the symbolic link",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "look at the disk, which reports a failure",
    errno.ESTALE: "look at the network file system, which has lost the file",
}


def remedy(error: Exception) -> str:
    """Remedy for a file that the system refuses to read or write."""
    return _REMEDIES.get(system_code(error) or 0, "look at its disk and its permissions")


def system_code(error: Exception) -> int | None:
    """The system's number of an error; safetensors and tokenizers have it in their text only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; at the end flush what was written there and rename it to `path`.

    A kill leaves the old file or the new one. Raises OSError; the temporary file is then removed.
    """
    aside = path.with_name(f"{WRITING}{path.name}")
    try:
        yield aside
        flush_to_disk(aside)
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def replace_file(path: Path, text: str) -> None:
    """Write a temporary file, flush it to disk and rename it: `path` holds either the old text or the new one.

    Raises OSError; the temporary file is then removed.
    """
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def flush_to_disk(path: Path) -> None:
    """Flush a file or directory from the system's cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete_tree(path: Path) -> None:
    """Delete a directory, or a file in its place. It is renamed first, so a kill leaves no half of it under its name.

    Raises OSError if it cannot be renamed. What cannot be deleted afterwards stays under the other name.
    """
    if not os.path.lexists(path):
        return
    aside = path.with_name(f"{DELETING}{path.name}")
    _remove(aside)
    path.rename(aside)
    _remove(aside)


def delete_leftovers(directory: Path) -> None:
    """Delete what a killed run was writing or deleting in a directory."""
    for path in _leftovers(directory):
        _remove(path)


def has_leftovers(directory: Path) -> bool:
    """True if a killed run was writing or deleting something in a directory."""
    return bool(_leftovers(directory))


def _leftovers(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.name.startswith((WRITING, DELETING))]
    except OSError:
        return []


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
