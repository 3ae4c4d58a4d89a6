"""Tables and the form of their cells, the same in the terminal and in markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from deepgrpo.terminal import print_columns

Form = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class ComparisonTable:
    """One table. Example: ComparisonTable("What was spent", ("arm", "steps"), (("grpo", "120"),))."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def print_comparison(console: Console, table: ComparisonTable) -> None:
    """Print a table in the terminal."""
    print_columns(console, table.columns, table.rows, title=table.title)
    console.print()


def markdown_table(table: ComparisonTable) -> list[str]:
    """The lines of a table in markdown, without its title."""
    head, *rows = ("| " + " | ".join(cell or " " for cell in row) + " |" for row in (table.columns, *table.rows))
    return [head, "|---" + "|--:" * (len(table.columns) - 1) + "|", *rows]


def without_empty(table: ComparisonTable) -> ComparisonTable:
    """Drop columns without any figure."""
    kept = [
        i for i in range(len(table.columns)) if i == 0 or not table.rows or any(row[i] != "–" for row in table.rows)
    ]
    return ComparisonTable(
        table.title, tuple(table.columns[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in table.rows)
    )


# ---------------------------------------------------------------- forms


def percent(x: float) -> str:
    return f"{100 * x:.1f}"


def one(x: float) -> str:
    return f"{x:.1f}"


def whole(x: float) -> str:
    return f"{x:,.0f}"


def three(x: float) -> str:
    return f"{x:.3g}"


def short(x: float) -> str:
    """950, 12k, 1.25M."""
    if x < 1000:
        return f"{x:.0f}"
    return f"{x / 1e3:.0f}k" if x < 999_500 else f"{x / 1e6:.2f}M"
