"""Options of `deepgrpo report` and `inspect`, parsed before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

DEFAULT_MAX_TREES = 10_000
"""Trees per run in a page; docs/report.md has the size and the opening time of such a page."""


@dataclass(frozen=True)
class ReportOptions:
    """Write one self-contained HTML page about one or several runs: learning curves, pivots, and every saved tree."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...", help_behavior_hint="")]
    """Run directories, such as runs/demo; the curves of several are drawn over each other."""
    out: Path | None = None
    """File to write. Default: RUN/report.html of the first run."""
    max_trees: Annotated[int, tyro.conf.arg(help=f"""Trees per run in the page; of a run with more, whole steps are left out evenly. 0: none. (default: {DEFAULT_MAX_TREES:,})""", help_behavior_hint="")] = DEFAULT_MAX_TREES  # fmt: skip  # noqa: E501
    title: str | None = None
    """Heading of the page. Default: the names of the runs."""


@dataclass(frozen=True)
class InspectOptions:
    """Show saved trees of a run in the terminal: without --step its steps, with --step that step's prompts, with --prompt
    one tree with rollouts, pivots, branches, rewards and advantages.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory, such as runs/demo."""
    step: int | None = None
    """A step with saved trees."""
    prompt: str | None = None
    """Id of a prompt, or its number in the step's list. Without --step: its newest tree."""
    only: Literal["rescued", "unrecoverable", "truncated", "mixed"] | None = None
    """Only trees with a branch better than its rollout, with a pivot that has none, with a response that was cut off, with
    unequal rewards among the rollouts."""
    width: int | None = None
    """Columns to use. Default: those of the terminal."""
