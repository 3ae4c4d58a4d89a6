"""A rich console that shows data as it is, and tables that fit it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from deepgrpo.visible import visible


class Terminal(Console):
    """A console that shows data as it is: without markup, emoji names, highlighting or control characters.

    Example: `Terminal().print("[red]")` shows `[red]`.
    """

    def __init__(self, **options: Any) -> None:
        # force_jupyter: in a notebook rich would make an HTML block of every line
        super().__init__(highlight=False, markup=False, emoji=False, force_jupyter=False, **options)

    def render_str(self, text: str, **how: Any) -> Text:
        """See `Console.render_str`: every string that is printed, in tables too."""
        return super().render_str(visible(text), **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See `Console.render`: the last step of everything else."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control or text.isprintable() else Segment(visible(text), style)


def print_columns(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", left: Sequence[int] = (0,),
    rule: bool = True,
) -> None:  # fmt: skip
    """Print a table whose first column names the rows. Where it is too wide for a terminal, headings are wrapped, and columns
    that still do not fit follow in a further block, beside the first column. No cell is cut.

    Args:
        console: a terminal or a file. A file gets the whole width of the table.
        left: columns that are aligned to the left.
        rule: a line under the headings.
    """
    if title:
        console.print(Text(visible(title), style="italic"), soft_wrap=not console.is_terminal)
    for table in fitted(console, columns, rows, left, box.SIMPLE_HEAD if rule else None):
        if not console.is_terminal:
            console.width = max(console.width, _width(console, table))
        console.print(table)


def fitted(
    console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int], frame: box.Box | None
) -> list[Table]:
    """The blocks of a table, each as wide as the console at most."""
    whole = range(len(columns))
    name_width = max(12, console.width // 3)

    def build(chosen: Sequence[int], *, narrow: bool, cells_wrap: bool = False) -> Table:
        table = Table(box=frame, pad_edge=False, show_edge=False)
        for i in chosen:
            heading = columns[i]
            if narrow:
                needed = max((len(line) for row in rows for line in row[i].splitlines()), default=1)
                heading = "\n".join(textwrap.wrap(heading, max(needed, *map(len, heading.split() or [""]), 1)))
            table.add_column(
                heading, justify="left" if i in left else "right", no_wrap=bool(i) and not cells_wrap, overflow="fold",
                max_width=name_width if narrow and not i else None,
            )  # fmt: skip
        for row in rows:
            table.add_row(*(row[i] for i in chosen))
        return table

    def fits(table: Table) -> bool:
        return _width(console, table) <= console.width

    table = build(whole, narrow=False)
    if not console.is_terminal or fits(table):
        return [table]
    blocks: list[list[int]] = [[0]]
    for i in whole[1:]:
        if len(blocks[-1]) > 1 and not fits(build([*blocks[-1], i], narrow=True)):
            blocks.append([0])
        blocks[-1].append(i)
    found = [(block, build(block, narrow=True)) for block in blocks]
    return [each if fits(each) else build(block, narrow=True, cells_wrap=True) for block, each in found]


def _width(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(width=10_000)).maximum
