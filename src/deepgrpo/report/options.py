"""Options of `deepgrpo report` and `deepgrpo inspect`, parsed before any file is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

DEFAULT_MAX_TREES = 10_000
"""Trees per run in a page; docs/report.md states the size and opening time of such a page."""


@dataclass(frozen=True)
class ReportOptions:
    """Write one self-contained HTML page about one or several runs: learning curves, pivots, and every saved tree."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...", help_behavior_hint="")]
    """Run directories, such as runs/demo; the curves of several runs share the same axes."""
    out: Path | None = None
    """File to write. Default: RUN/report.html of the first run."""
    max_trees: Annotated[int, tyro.conf.arg(help=f"""Maximum number of trees per run in the page; longer runs drop whole steps evenly. 0: none. (default: {DEFAULT_MAX_TREES:,})""", help_behavior_hint="")] = DEFAULT_MAX_TREES  # fmt: skip  # noqa: E501
    title: str | None = None
    """Heading of the page. Default: the names of the runs."""


@dataclass(frozen=True)
class InspectOptions:
    """Show the saved trees of a run in the terminal: its steps; with --step the prompts of that step; with --prompt one tree
    with rollouts, pivots, branches, rewards and advantages.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory, such as runs/demo."""
    step: int | None = None
    """A step with saved trees."""
    prompt: str | None = None
    """Prompt id, or its number in the list of the step. Without --step: the newest tree of the prompt."""
    only: Literal["rescued", "unrecoverable", "truncated", "mixed"] | None = None
    """Filter: trees with a branch that succeeds and beats its rollout (rescued), with a pivot that has none
    (unrecoverable), with a response cut off at the length limit (truncated), or with unequal rewards among the rollouts
    (mixed)."""
    states: bool = False
    """With --prompt, for a run with an environment: show its state at every pivot."""
    width: int | None = None
    """Output width in columns. Default: the width of the terminal."""
