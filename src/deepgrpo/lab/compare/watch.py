"""Display of running jobs: a live table on a terminal, otherwise one line per event."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from deepgrpo.lab.compare.cells import percent, short
from deepgrpo.lab.compare.jobs import Job, Jobs, State, last_line
from deepgrpo.lab.compare.plan import PlannedRun
from deepgrpo.lab.compare.run_figures import spent
from deepgrpo.runs.metrics import newest_metrics

_REFRESH_S = 1.0


class Watch:
    """Context manager around `Jobs.run`."""

    def __init__(self, runs: Sequence[PlannedRun], jobs: Jobs, out: Console) -> None:
        self.jobs, self.out = jobs, out
        self._runs = {run.name: run for run in runs}
        self._began: dict[str, tuple[float, float]] = {}
        """Name → start time of a run, and the tokens it had sampled by then."""
        self._live: Live | None = None
        self._shown = 0.0

    def __enter__(self) -> Self:
        if self.out.is_terminal:
            self._live = Live(console=self.out, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def changed(self, job: Job, state: State) -> None:
        """Report a job that has started or ended."""
        run = self._runs.get(job.name)
        if state == "running":
            tokens = 0.0 if run is None else spent(newest_metrics(run.paths.metrics), "sampled_tokens")
            self._began[job.name] = (time.monotonic(), tokens)
        if run is None and state != "failed" and job.name.endswith("-final"):
            return  # the line of the run itself suffices
        said = f"{job.name} {'started' if state == 'running' else state}"
        if run is not None and state == "running" and self._began[job.name][1]:
            said = f"{job.name} continues at {self._began[job.name][1]:,.0f} tokens"
        if run is not None and state == "done":
            line = newest_metrics(run.paths.metrics)
            greedy = line.get("eval/greedy")
            said += f": {spent(line, 'sampled_tokens'):,.0f} tokens, {spent(line, 'optimizer_steps'):.0f} optimizer steps"
            said += "" if greedy is None else f", greedy {percent(greedy)}%"
        if state == "failed":
            said += f": {last_line(job.log)}"
        self.out.print(said, markup=False, soft_wrap=True)

    def tick(self) -> None:
        """Redraw the table, at most once a second."""
        if self._live is not None and time.monotonic() - self._shown > _REFRESH_S:
            self._shown = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        done = sum(self.jobs.state[name] == "done" for name in self._runs)
        title = f"{done} of {len(self._runs)} runs" + ("; stopping after this step" if self.jobs.stopping else "")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("running", "tokens", "", "step", "greedy", "min left"):
            first = column == "running"
            table.add_column(column, justify="left" if first else "right", overflow="fold", no_wrap=not first)
        for name, state in self.jobs.state.items():
            if state == "running":
                table.add_row(*self._row(name, self._runs.get(name)))
        return table

    def _row(self, name: str, run: PlannedRun | None) -> tuple[str, ...]:
        began, before = self._began[name]
        seconds = time.monotonic() - began
        if run is None:
            return name, "", "", "", "", f"({seconds / 60:.0f})"
        line = newest_metrics(run.paths.metrics)
        tokens, budget = spent(line, "sampled_tokens"), run.budget
        rate = (tokens - before) / seconds if tokens > before else 0.0
        left = f"{max(0.0, budget - tokens) / rate / 60:.0f}" if rate else "?"
        greedy = line.get("eval/greedy")
        return (
            name, short(tokens), f"{min(1.0, tokens / budget):.0%}", f"{line.get('step', 0):.0f}",
            "" if greedy is None else percent(greedy), left,
        )  # fmt: skip
