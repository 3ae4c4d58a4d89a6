"""`deepgrpo report`: run directories in, one HTML page out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.markup import escape
from rich.progress import Progress, TaskID

from deepgrpo import __version__
from deepgrpo.errors import ConfigError, DataError
from deepgrpo.report.options import ReportOptions
from deepgrpo.report.page import write_page
from deepgrpo.report.run_page import RunPage, build_page
from deepgrpo.runs.saved import SavedRun
from deepgrpo.terminal import Terminal
from deepgrpo.visible import visible

_LARGE = 100 * 2**20
"""Page size in bytes above which browsers are slow to open it."""


def run_report(options: ReportOptions) -> int:
    """Write the page and print its path.

    Raises:
        ConfigError: no run is named, --max-trees is negative, or the page cannot be written.
        DataError: a directory is not a run, or the run has no step yet.
    """
    if not options.runs:
        raise ConfigError("deepgrpo report needs a run directory, e.g. deepgrpo report runs/demo")
    if options.max_trees < 0:
        raise ConfigError(f"--max-trees is {options.max_trees}; set it to 0 for a page without trees, or to more")
    runs = [SavedRun(path) for path in unique(options.runs)]
    for run in runs:
        if not run.metrics:
            raise DataError(f"{run.paths.metrics} has no step yet; wait for the first, or name another run")
    path = options.out or runs[0].paths.report
    if path.is_dir():
        example = path / runs[0].paths.report.name
        raise ConfigError(f"--out is {str(path)!r}, which is a directory; name a file, e.g. --out {example}")
    names = label_runs(runs)
    pages = _read_pages(runs, names, options.max_trees)
    for page, name in zip(pages, names, strict=True):
        page.data["name"] = name

    def blocks() -> Iterator[tuple[str, str]]:
        for number, page in enumerate(pages):
            for place, text in enumerate(page.blocks):
                yield f"block-{number}-{place}", text

    title = options.title or ", ".join(names)
    data = {"version": __version__, "title": title, "runs": [page.data for page in pages]}
    try:
        size = write_page(path, title, data, blocks())
    except OSError as error:
        why = f"{path.parent} does not exist" if not path.parent.exists() else error.strerror or error
        raise ConfigError(f"{path} cannot be written: {why}; choose another place with --out FILE") from error
    for page in pages:
        for note in page.notes:
            print(visible(f"note: {note}"))
    shown = sum(page.data["trees"]["shown"] for page in pages)
    print(visible(f"{path}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {shown:,} trees, {size / 2**20:.1f} MiB"))
    if size > _LARGE:
        print("note: a page of this size takes a browser several seconds to open; --max-trees makes it smaller")
    return 0


def unique(paths: Sequence[Path]) -> list[Path]:
    """The paths in order, without repetitions, however each is spelled."""
    found: dict[Path, Path] = {}
    for path in paths:
        found.setdefault(path.resolve(), path)
    return list(found.values())


def label_runs(runs: Sequence[SavedRun]) -> list[str]:
    """A name for each run: its directory name, extended by parent directories until all names differ."""
    parts = [run.directory.resolve().parts for run in runs]
    depth = [1] * len(runs)
    while True:
        names = ["/".join(part[-n:]) for part, n in zip(parts, depth, strict=True)]
        twice = {name for name, count in Counter(names).items() if count > 1}
        grown = [n + 1 if name in twice and n < len(p) else n for name, n, p in zip(names, depth, parts, strict=True)]
        if grown == depth:
            return names
        depth = grown


def _advance(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def _read_pages(runs: Sequence[SavedRun], names: Sequence[str], max_trees: int) -> list[RunPage]:
    """Read the runs one by one, with a progress bar on a terminal."""
    pages = []
    with Progress(console=Terminal(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        for run, name in zip(runs, names, strict=True):
            task = bar.add_task(escape(f"reading {name}"), total=None)
            pages.append(build_page(run, max_trees, partial(_advance, bar, task)))
    return pages
