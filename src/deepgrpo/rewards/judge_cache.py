"""Answers of a judge on disk, found again by the request that led to them.

One SQLite file: safe under kills, and shared by processes. A cache that fails costs answers, never the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepgrpo.errors import first_line

_log = logging.getLogger(__name__)

_AT_ONCE = 500  # keys per query; SQLite's own limit is higher


class AnswerCache:
    """Answers by key (`key_of`). Opened with the first use; a forked process opens its own."""

    def __init__(self, directory: str | None) -> None:
        """`directory` None: keep nothing."""
        self._directory = directory
        self._opened: tuple[int, sqlite3.Connection] | None = None

    def find(self, keys: Sequence[str]) -> dict[str, str]:
        """The known answers among these keys."""
        found: dict[str, str] = {}
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            marks = ", ".join("?" * len(some))
            found |= dict(self._do(f"SELECT key, answer FROM answers WHERE key IN ({marks})", some))
        return found

    def keep(self, key: str, answer: str) -> None:
        """Write an answer; it is on disk when this returns."""
        self._do("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, answer))

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        opened, self._opened = self._opened, None
        if opened is not None and opened[0] == os.getpid():
            opened[1].close()

    def _do(self, statement: str, values: Sequence[str]) -> list[tuple[str, str]]:
        if self._directory is None:
            return []
        try:
            connection = self._connection(Path(self._directory))
            with connection:  # commits
                return connection.execute(statement, tuple(values)).fetchall()
        except (sqlite3.Error, OSError, UnicodeError) as error:
            _log.warning(
                "reward.cache %r cannot be used (%s); the judge is asked every time", self._directory, first_line(error)
            )
            self._directory = None
            return []

    def _connection(self, directory: Path) -> sqlite3.Connection:
        if self._opened is None or self._opened[0] != os.getpid():
            directory.mkdir(parents=True, exist_ok=True)
            # calls come from the thread of a round, one at a time
            connection = sqlite3.connect(directory / "answers.sqlite", timeout=30.0, check_same_thread=False)
            self._opened = os.getpid(), connection
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID"
            )
        return self._opened[1]


def key_of(body: Mapping[str, Any]) -> str:
    """Key of a request: a digest of its model, turns and settings. The server's address and key are no part of it."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
