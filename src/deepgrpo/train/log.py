"""The log of a run: files, terminal and external sinks.

    StepReport ─► metrics.jsonl   one JSON object per step, flushed at once
               ─► log.txt         the lines of the terminal, with timestamps
               ─► terminal        one line per step, and live bars of the steps and of the work within one (progress.py)
               ─► sinks           TensorBoard, wandb, trackio, if enabled

Without a terminal (a pipe, a batch job) the output is plain text: no colours, no bar, no control characters.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import TaskID
from rich.text import Text

from deepgrpo.config import LogConfig
from deepgrpo.ledger import StepReport
from deepgrpo.progress import Display, showing
from deepgrpo.records import Tree
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.metrics import write_step
from deepgrpo.terminal import Terminal
from deepgrpo.train.shown import Shown, shown_of
from deepgrpo.train.sinks import Sink, open_sinks
from deepgrpo.visible import visible


class _Terminal(Terminal):
    """Standard output that tolerates a closed pipe and a full disk behind it; log.txt holds everything.

    In `deepgrpo train | tee` the same Ctrl-C ends `tee`, and the run must still save its step.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            self.on_broken_pipe()
            with suppress(OSError):
                print(
                    f"warning: standard output cannot be written: {error.strerror}; the run goes on, see log.txt",
                    file=sys.stderr,
                )

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def opening(*, show: bool = True) -> Iterator[None]:
    """Show the progress of the work before a run has its log, such as loading the model."""
    with Display(_Terminal(quiet=not show)) as display, showing(display):
        yield


class RunLog:
    """The log of one run; a context manager.

    Example: `with RunLog(run_dir, config.log, total_steps=100, name="demo") as log: log.step(report)`.
    """

    def __init__(
        self,
        directory: Path,
        config: LogConfig | None = None,
        *,
        total_steps: int,
        name: str = "run",
        recipe: Mapping[str, Any] | None = None,
        done_steps: int = 0,
        show: bool = True,
        console: Console | None = None,
    ) -> None:
        """Open the sinks that `config` enables; the files are opened on entering.

        Args:
            directory: the run directory; created if missing.
            config: sinks to open; default: none.
            total_steps: length of the run, for the progress bar.
            name: name of the run in wandb and trackio.
            recipe: the resolved config, shown by wandb and trackio.
            done_steps: step of the resumed checkpoint. Call `truncate_metrics` before entering.
            show: write lines to the console; False: to log.txt alone.
            console: output; default: standard output.

        Raises:
            MissingExtraError: a sink's package is not installed.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.paths = RunDir(directory)
        self.console = console or _Terminal(quiet=not show)
        self.total_steps, self.done_steps = total_steps, done_steps
        self.config = config or LogConfig()
        self.sinks: list[Sink] = open_sinks(
            self.config, self.paths, name=name, recipe=recipe, first_step=done_steps + 1
        )
        self._metrics: TextIO | None = None
        self._text: TextIO | None = None
        self.display = Display(self.console, say=self.note, transient=False)
        self._task: TaskID | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._metrics = self.paths.metrics.open("a", encoding="utf-8")
        self._text = self.paths.log.open("a", encoding="utf-8", errors="backslashreplace")
        self._open.enter_context(self.display)
        if self.display.live:
            self._task = self.display.add("step", self.total_steps, completed=self.done_steps)
        self._open.enter_context(showing(self.display))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        for sink in self.sinks:
            sink.close()
        for file in (self._metrics, self._text):
            if file:
                file.close()

    def step(self, report: StepReport, trees: Sequence[Tree] = ()) -> None:
        """Write one step to all outputs and show its line, then its warnings.

        Args:
            trees: of the step, of which the sinks show distributions and some responses.
        """
        assert self._metrics is not None, "RunLog.step outside of its with statement"
        line = write_step(self._metrics, report)
        values = {k: v for k, v in line.items() if v is not None and k not in ("step", "warnings")}
        every = self.config.responses_every
        shown = Shown()
        if self.sinks:
            count = self.config.responses if every and report.step % every == 0 else 0
            shown = shown_of(report.step, trees, count)
        for sink in self.sinks:
            sink.write(report.step, {k: _finite_only(v) for k, v in values.items()}, shown)
        text = step_line(report, self.total_steps)
        self._show(text, shown="\n    ".join(broken(text, self.console.width - 4)) if self.console.is_terminal else text)
        for warning in report.warnings:
            self.warn(warning)
        if (live := self.display.live) and self._task is not None:
            figures = _figures(report.metrics, ("main/reward", "eval/greedy", "main/entropy", "tokens_per_s"))
            live.update(self._task, completed=report.step, total=self.total_steps, figures=figures)

    def note(self, text: str) -> None:
        """Show a line about the progress of the run."""
        self._show(text)

    def warn(self, text: str) -> None:
        """Show a highlighted warning."""
        self._show(f"warning: {text}", style="yellow")

    def _show(self, text: str, style: str | None = None, *, shown: str | None = None) -> None:
        """Print a text, or in its place `shown`, and write it to log.txt."""
        text = visible(text)
        # Text: brackets are not markup, and the colour does not spill into the progress bar
        # soft_wrap: in a pipe rich would otherwise break lines at 80 columns
        self.console.print(Text(shown or text, style=style or ""), soft_wrap=True)
        if self._text:
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
            self._text.flush()


def step_line(report: StepReport, total_steps: int) -> str:
    """A step as a readable line; missing figures are left out.

    `step 12/60  reward .41  mixed 62%  branch .23  eval .58  entropy .33  len 38  grad 0.8  19k tok/s`
    """
    figures = _figures(report.metrics, tuple(_LABELS))
    return "  ".join([f"step {report.step:>{len(str(total_steps))}}/{total_steps}", *figures])


def broken(line: str, width: int) -> list[str]:
    """A line of figures, broken between figures into lines of at most `width` columns."""
    lines: list[str] = []
    for figure in line.split("  "):
        if lines and len(lines[-1]) + 2 + len(figure) <= width:
            lines[-1] += f"  {figure}"
        else:
            lines.append(figure)
    return lines


def _finite_only(value: Any) -> Any:
    return [each for each in value if each is not None] if isinstance(value, list) else value


# ---------------------------------------------------------------- figures


def _share(x: float) -> str:
    return f"{x:.0%}"


def _short(x: float) -> str:
    """`.41`, `-.25`, `1.00`: two decimals without the leading zero."""
    text = f"{x:.2f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def _count(x: float) -> str:
    if x < 1000:
        return f"{x:.0f}"
    return f"{x / 1000:.1f}k" if x < 9950 else f"{x / 1000:.0f}k"


def _two_digits(x: float) -> str:
    return f"{x:.2g}" if x < 1000 else f"{x:.0f}"


_LABELS = {
    "main/reward": ("reward {}", _short),
    "main/mixed": ("mixed {}", _share),
    "branch/reward": ("branch {}", _short),
    "eval/greedy": ("eval {}", _short),
    "main/entropy": ("entropy {}", _short),
    "main/length": ("len {}", _count),
    "grad_norm": ("grad {}", _two_digits),
    "tokens_per_s": ("{} tok/s", _count),
}


def _figures(metrics: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    figures = []
    for name in names:
        value = metrics.get(name)
        if name == "grad_norm" and value is not None and math.isnan(value):
            figures.append("no signal")  # no row had an advantage; a broken gradient would have ended the run
        elif value is not None:
            label, form = _LABELS[name]
            # show a metric that is present but not a number
            figures.append(label.format(form(float(value)) if math.isfinite(value) else "nan"))
    return figures
