"""A rich console that shows data as it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
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
