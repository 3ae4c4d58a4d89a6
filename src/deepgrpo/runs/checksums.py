"""Checksums of the files of a directory: a change since they were written is found before the files are used.

    {"model/model.safetensors": {"bytes": 903264, "crc32": "5f0c31d2"}, ...}

CRC-32 finds bit flips, cut files and files of another run. It is no protection against intent: whoever can change the files
can change their checksums too. It reads 1 to 3 GB/s per core, and files are read in parallel.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_CHUNK = 1 << 23
_THREADS = 4

Checksums = dict[str, dict[str, Any]]


def crc_of(data: bytes) -> str:
    """CRC-32 as eight hexadecimal digits.

    >>> crc_of(b"123456789")
    'cbf43926'
    """
    return f"{zlib.crc32(data):08x}"


def checksums(directory: Path) -> Checksums:
    """Size and CRC-32 of every file below a directory, by its path in it. Raises OSError."""
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _checksum(directory / name), names), strict=True))


def changed_files(directory: Path, recorded: Mapping[str, Mapping[str, Any]], *, below: str = "") -> list[str]:
    """One phrase for each recorded file that is missing or differs; empty if all are as they were written.

    Args:
        below: only files whose path begins with this. Sizes are compared first, so a cut file is found without reading it.

    Raises OSError if a file cannot be read.
    """
    names = [name for name in recorded if name.startswith(below)]
    found = [phrase for name in names if (phrase := _differs(directory / name, name, int(recorded[name]["bytes"])))]
    if found:
        return found
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda name: _checksum(directory / name), names)
        return [
            f"{name} has changed since it was written (CRC-32 {now['crc32']} for {recorded[name]['crc32']})"
            for name, now in zip(names, sums, strict=True) if now["crc32"] != recorded[name]["crc32"]
        ]  # fmt: skip


def is_checksums(raw: Any) -> bool:
    """True for what `checksums` returns, read back from JSON; no path leads out of the directory."""
    return isinstance(raw, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("crc32"), str)
        and not os.path.isabs(name) and ".." not in Path(name).parts
        for name, entry in raw.items()
    )  # fmt: skip


def _differs(path: Path, name: str, size: int) -> str | None:
    if not path.is_file():
        return f"{name} is no file" if os.path.lexists(path) else f"{name} is missing"
    now = path.stat().st_size
    return None if now == size else f"{name} has {now:,} bytes, and {size:,} were written"


def _checksum(path: Path) -> dict[str, Any]:
    size = crc = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return {"bytes": size, "crc32": f"{crc:08x}"}
