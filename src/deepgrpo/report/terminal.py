"""Texts and numbers for the terminal."""

from __future__ import annotations


def plain(text: str, keep: str = "") -> str:
    r"""Text that cannot control a terminal: control characters and direction marks become visible, line breaks ⏎.

    >>> plain("a\nb\x1b[2J")
    'a⏎b\\x1b[2J'
    """
    return "".join(c if c in keep or c.isprintable() else "⏎" if c == "\n" else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    if character.isspace() and code > 0x20:
        return " "  # spaces of any width
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def several(count: int, noun: str) -> str:
    """`1 token`, `1,086 tokens`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def short(value: float) -> str:
    """`.41`, `1.00`."""
    return f"{value:.2f}".removeprefix("0")
