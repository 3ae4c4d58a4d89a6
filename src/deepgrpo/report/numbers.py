"""Numbers for the terminal."""

from __future__ import annotations


def several(count: int, noun: str) -> str:
    """`1 token`, `1,086 tokens`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def short(value: float) -> str:
    """`.41`, `1.00`."""
    return f"{value:.2f}".removeprefix("0")
