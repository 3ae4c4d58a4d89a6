"""Progress of long work: reported where it is done, shown where a command wants it shown.

    with phase("sampling", 256) as advance:     # an engine, a reward, the learner, a loader
        advance(4, "3,210 tokens")

    with showing(Display(console)):             # a command, or the log of a run
        ...

A terminal gets a moving line per open phase. Elsewhere work that takes longer than half a minute gets a plain line every half
minute. Outside `showing` a phase costs nothing and shows nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from deepgrpo.visible import visible

PLAIN_EVERY_S = 30.0
"""Seconds before work gets its first plain line, and between two of them."""

_LOOK_EVERY_S = 5.0
"""Seconds between two looks whether a plain line is due."""

WIDE = 80
"""Columns from which a bar has its full length."""

Advance = Callable[..., None]
"""(count done since the last call = 1, figures to show beside it = "")."""


@dataclass
class Phase:
    """An open phase; `str(phase)` is "sampling 130/256, 34,200 tokens"."""

    what: str
    total: int | None
    began: float
    outer: Phase | None = None
    done: int = 0
    figures: str = ""
    task: TaskID | None = None
    def __str__(self) -> str:
        count = "" if self.total is None else f" {self.done:,}/{self.total:,}"
        return f"{self.what}{count}" + (f", {self.figures}" if self.figures else "")


class Display:
    """Shows open phases on a console; a context manager that holds the live lines.

    Args:
        console: a terminal with live lines, or a file with plain ones.
        say: prints a plain line; default: the console.
        transient: remove the live lines at the end.
        clock: seconds, for plain lines.
    """

    def __init__(
        self, console: Console, *, say: Callable[[str], None] | None = None, transient: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.console, self.clock = console, clock
        self.say = say or (lambda line: console.print(Text(line), soft_wrap=True))
        self.phases: list[Phase] = []
        """Open phases, the newest last."""
        self.told = -math.inf
        """Time of the newest plain line."""
        self._ended = threading.Event()
        self._teller: threading.Thread | None = None
        self.bar_width = 20 if console.width >= WIDE else 8
        self.live: Progress | None = None
        if console.is_terminal and not console.quiet:
            self.live = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=self.bar_width),
                _Count(),
                _Clock(),
                _Figures(self),
                console=console,
                transient=transient,
                # a step may take minutes: with rich's window of 30 s no earlier step would count, and no estimate appear
                speed_estimate_period=24 * 3600.0,
            )

    def __enter__(self) -> Self:
        if not self.live:
            # a thread: what takes long may be a single call, such as a user's reward
            self._teller = threading.Thread(target=self._tell_until_the_end, daemon=True)
            self._teller.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._teller:
            self._teller.join()
        if self.live:
            self.live.stop()

    def add(self, what: str, total: int | None, *, completed: int = 0) -> TaskID:
        """Add a live line. The first one starts them: without any, a library may draw its own bar."""
        assert self.live is not None
        task = self.live.add_task(what, total=total, completed=completed, figures=())
        self.live.start()
        return task

    def open(self, what: str, total: int | None, outer: Phase | None, live: bool) -> Phase:
        phase = Phase(visible(what), total, self.clock(), outer)
        self.phases.append(phase)
        if self.live and live:
            phase.task = self.add(phase.what, total)
        return phase

    def advance(self, phase: Phase, count: int, figures: str) -> None:
        phase.done += count
        phase.figures = figures or phase.figures
        if self.live and phase.task is not None:
            self.live.update(phase.task, completed=phase.done, figures=(phase.figures,))

    def close(self, phase: Phase) -> None:
        self.phases.remove(phase)
        if self.live and phase.task is not None:
            self.live.remove_task(phase.task)
            if not self.live.tasks:
                self.live.stop()

    def tell(self) -> None:
        """Print a plain line about the newest open phase, if it is time for one."""
        now = self.clock()
        chain = self.phases[-1:]
        while chain and (outer := chain[0].outer) is not None:
            chain.insert(0, outer)
        if chain and now - max(chain[0].began, self.told) >= PLAIN_EVERY_S:
            self.told = now
            self.say(f"{' · '.join(map(str, chain))}, {clock_time(now - chain[-1].began)}")

    def _tell_until_the_end(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            self.tell()


_shown: ContextVar[tuple[Display, Phase | None] | None] = ContextVar("shown", default=None)
"""The display in force, and its innermost open phase."""


@contextmanager
def showing(display: Display | None) -> Iterator[None]:
    """Show the phases inside the block on a display that is open; None: nowhere."""
    before = _shown.get()
    _shown.set(None if display is None else (display, None))
    try:
        yield
    finally:
        _shown.set(before)  # not by its token: a generator may be closed in another context


def is_shown() -> bool:
    """True inside `showing`."""
    return _shown.get() is not None


@contextmanager
def phase(what: str, total: int | None = None, *, live: bool = True) -> Iterator[Advance]:
    """Announce work inside the block; yields the function that reports what is done of it.

    Args:
        what: a few words, such as "sampling".
        total: what there is to do; None if that is not known, or cannot be followed.
        live: False: no moving line, as a library may draw one of its own.
    """
    shown = _shown.get()
    if shown is None:
        yield _nowhere
        return
    display, outer = shown
    opened = display.open(what, total, outer, live)
    _shown.set((display, opened))
    try:
        yield lambda count=1, figures="": display.advance(opened, count, figures)
    finally:
        display.close(opened)
        _shown.set(shown)


def _nowhere(count: int = 1, figures: str = "") -> None:
    return


# ---------------------------------------------------------------- columns of the live lines


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_count(task), style="progress.download")


class _Clock(ProgressColumn):
    """Time left once it can be estimated, before that the time so far."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = None if task.total is None or task.finished else task.time_remaining
        return Text(clock_time(task.elapsed or 0.0) if left is None else f"{clock_time(left)} left", style="progress.remaining")


class _Figures(ProgressColumn):
    """As many figures as fit whole beside the other columns."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self.display = display

    def render(self, task: Task) -> Text:
        live = self.display.live
        assert live is not None
        others = max(len(each.description) + len(_count(each)) for each in live.tasks)
        return Text(fitting(task.fields["figures"], live.console.width - others - self.display.bar_width - _CLOCK_WIDTH - 4))


_CLOCK_WIDTH = len("1:23:45 left")


def _count(task: Task) -> str:
    return "" if task.total is None else f"{int(task.completed)}/{int(task.total)}"


def fitting(figures: Sequence[str], width: int) -> str:
    """The first figures that fit whole into a width, with two blanks between."""
    line = ""
    for each in figures:
        longer = f"{line}  {each}" if line else each
        if len(longer) > width:
            break
        line = longer
    return line


def clock_time(seconds: float) -> str:
    """`0:42`, `3:05`, `2:10:00`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
