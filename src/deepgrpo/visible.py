"""Text from data made visible: no control character or direction mark of it reaches a terminal.

`visible` is the rule. `terminal.Terminal` and `guard_messages`, for log records, warnings and tracebacks, apply it; plain
`print` needs it by hand. Colours that this package chooses are styles of rich, never characters of a text.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any, TextIO

_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def visible(text: str, keep: str = "\n\t") -> str:
    r"""Text that cannot control a terminal: control characters and direction marks as escapes, spaces of any width as " ".

    >>> visible("a\x1b[2J\u202eb")
    'a\\x1b[2J\\u202eb'

    Args:
        text: from data, a file name, a user's code.
        keep: characters that stay. Without the line break in it, line breaks become ⏎.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else "⏎" if c == "\n" else _escape(c) for c in text)


def plain(text: str) -> str:
    r"""Visible text on one line.

    >>> plain("a\nb")
    'a⏎b'
    """
    return visible(text, keep="")


def _escape(character: str) -> str:
    code = ord(character)
    if character.isspace() and code > 0x20:
        return " "  # spaces of any width
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _visible_but_colours(text: str) -> str:
    """Visible text in which colours stay: libraries colour their messages, and a colour moves nothing."""
    return "".join(part if number % 2 else visible(part) for number, part in enumerate(_COLOUR.split(text)))


# ---------------------------------------------------------------- other messages


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802
        return _visible_but_colours(super().getMessage())


_format_warning = warnings.formatwarning


def _visible_warning(*arguments: Any, **options: Any) -> str:
    return visible(_format_warning(*arguments, **options))


def _visible_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(visible("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def guard_messages() -> None:
    """Make log records, warnings and tracebacks of this process visible text."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _visible_warning
    sys.excepthook = _visible_traceback


class GuardedStream:
    """A stream for a library that prints arguments as they came; its own colours stay if no argument has any.

    Args:
        stream: a terminal or a file.
        arguments: what the library may print.
    """

    def __init__(self, stream: TextIO, arguments: Iterable[str]) -> None:
        self._stream = stream
        self._convert = visible if any("\x1b" in each for each in arguments) else _visible_but_colours

    def write(self, text: str) -> int:
        return self._stream.write(self._convert(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
