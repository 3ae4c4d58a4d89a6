"""`deepgrpo inspect`: lists the saved trees of a run, or finds one of them for `tree_text.py` to draw."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from textwrap import shorten

from rich.console import Console
from rich.text import Text

from deepgrpo.errors import ConfigError, DataError
from deepgrpo.report.options import InspectOptions
from deepgrpo.report.tokens import read_tokens
from deepgrpo.report.tree_text import draw_tree
from deepgrpo.runs.facts import TreeFacts, tree_facts
from deepgrpo.runs.saved import SavedRun, nearest
from deepgrpo.runs.trees import SavedTree
from deepgrpo.terminal import Terminal, print_columns
from deepgrpo.visible import plain

_SHOWN = 60
"""Longest list of trees; --only shortens it."""
_QUESTION = 24
"""Columns that a question needs beside the figures of its tree."""


def run_inspect(options: InspectOptions) -> int:
    """Show the steps of a run, the trees of a step, or one tree.

    Raises:
        DataError: not a run directory, no trees, no such step or prompt; the message names what exists.
        ConfigError: --width is too small.
    """
    if options.width is not None and options.width < 40:
        raise ConfigError(f"--width is {options.width}; a tree needs at least 40 columns")
    run = SavedRun(options.run)
    if not run.tree_files:
        raise DataError(run.why_no_trees())
    # a response may contain characters that this terminal cannot show
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    console = Terminal(width=options.width)
    if options.prompt is not None:
        draw_tree(
            console, _find(run, options), read_tokens(run), run.success_threshold, only=options.only, states=options.states
        )
    elif options.step is not None:
        _list_trees(console, run, _step(run, options.step), options)
    else:
        _list_steps(console, run, options)
    return 0


def _step(run: SavedRun, step: int) -> int:
    steps = list(run.tree_files)
    if step not in run.tree_files:
        every = run.section("log").get("trees_every")
        raise DataError(
            f"--step {step}: {run.directory} has no trees of that step; the nearest steps with trees are "
            f"{', '.join(map(str, nearest(step, steps)))}" + (f" (log.trees_every is {every})" if every else "")
        )
    return step


def _find(run: SavedRun, options: InspectOptions) -> SavedTree:
    """The tree of a prompt: in the given step, else in the newest step that has it."""
    wanted = options.prompt
    assert wanted is not None
    steps = [_step(run, options.step)] if options.step is not None else list(run.tree_files)[::-1]
    refused: TreeFacts | None = None
    known: list[str] = []
    read: list[int] = []
    for step in steps:
        try:
            trees = list(run.trees(step))
        except DataError:
            if step == steps[-1] and not read:
                raise
            continue  # an older step may have the prompt
        read.append(step)
        found = [each for each in trees if each.tree.prompt.id == wanted]
        if not found and options.step is not None and wanted.isdecimal():
            found = [each for each in trees if each.number == int(wanted)]
        known = known or [each.tree.prompt.id for each in trees]
        for each in found:
            facts = tree_facts(each.tree, run.success_threshold)
            if options.only is None or options.only in facts.flags:
                return each
            refused = facts
    where = f"step {options.step}" if options.step is not None else f"any of the {len(read)} saved steps"
    if refused is not None:
        raise DataError(
            f"--prompt {wanted!r} is in {where}, but not {options.only}: it is {', '.join(sorted(refused.flags)) or 'none'}; "
            "drop --only"
        )
    raise DataError(
        f"--prompt {wanted!r} is not in {where}; step {read[0]} has {len(known)} prompts, such as "
        f"{', '.join(repr(name) for name in _like(wanted, known))}; `deepgrpo inspect {run.directory} --step {read[0]}` "
        "lists them"
    )


def _like(wanted: str, known: Sequence[str]) -> list[str]:
    """Known ids similar to the wanted one, followed by the first ones."""
    from difflib import get_close_matches

    close = get_close_matches(wanted, known)
    return (close + [name for name in known if name not in close])[:3]


def _list_steps(console: Console, run: SavedRun, options: InspectOptions) -> None:
    only = (f"only {options.only}",) if options.only else ()
    columns = ("step", "trees", "successes", "mixed", "pivots", "rescued", "truncated", *only)
    rows = []
    damaged: list[str] = []
    newest = None
    for step in run.tree_files:
        try:
            facts = [tree_facts(each.tree, run.success_threshold) for each in run.trees(step)]
        except DataError as error:
            damaged.append(str(error))
            rows.append([str(step), "?", *[""] * (len(columns) - 2)])
            continue
        newest = step
        rollouts, pivots = sum(f.rollouts for f in facts), sum(f.pivots for f in facts)
        row = [
            str(step), str(len(facts)), _share(sum(f.successes for f in facts), rollouts),
            _count(facts, "mixed"), str(pivots), _share(sum(f.rescued for f in facts), sum(f.chances for f in facts)),
            _count(facts, "truncated"),
        ]  # fmt: skip
        rows.append([*row, *([_count(facts, options.only)] if options.only else [])])
    print_columns(console, columns, rows, left=(), rule=False)
    for sentence in damaged:
        console.print(Text(f"\nnote: {sentence}"))
    if newest is not None:
        console.print(Text(f"\nthe trees of a step: deepgrpo inspect {run.directory} --step {newest}"), soft_wrap=True)


def _print_with_questions(console: Console, rows: Sequence[tuple[str, ...]], questions: Sequence[str]) -> None:
    """Print rows, headings first, each with its question: beside it where there is room, else on a line of its own."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    beside = console.width - sum(widths) - 2 * len(widths)
    for i, (row, question) in enumerate(zip(rows, questions, strict=True)):
        cells = [cell.ljust(n) if j in (1, 5) else cell.rjust(n) for j, (cell, n) in enumerate(zip(row, widths, strict=True))]
        style = "" if i else "bold"
        if beside >= _QUESTION:
            console.print(Text("  ".join([*cells, shorten(question, beside, placeholder=" …")]), style=style))
            continue
        console.print(Text("  ".join(cells).rstrip(), style=style))
        if i:
            indent = " " * (widths[0] + 2)
            console.print(Text(indent + shorten(question, console.width - len(indent), placeholder=" …"), style="dim"))


def _count(facts: Sequence[TreeFacts], flag: str) -> str:
    return str(sum(flag in each.flags for each in facts))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def _list_trees(console: Console, run: SavedRun, step: int, options: InspectOptions) -> None:
    trees = [(each, tree_facts(each.tree, run.success_threshold)) for each in run.trees(step)]
    chosen = [(each, facts) for each, facts in trees if options.only is None or options.only in facts.flags]
    if not chosen:
        every = [facts for _, facts in trees]
        counts = ", ".join(f"{flag} {_count(every, flag)}" for flag in ("rescued", "unrecoverable", "mixed"))
        console.print(Text(f"none of the {len(trees)} trees of step {step} is {options.only} ({counts}); drop --only"))
        return
    rows = [("#", "prompt", "right", "pivots", "rescued", "")]
    for each, facts in chosen[:_SHOWN]:
        rows.append((
            str(each.number), plain(each.tree.prompt.id), f"{facts.successes}/{facts.rollouts}", str(facts.pivots),
            f"{facts.rescued}/{facts.chances}" if facts.pivots else "–",
            " ".join(flag for flag in ("mixed", "truncated") if flag in facts.flags),
        ))  # fmt: skip
    _print_with_questions(console, rows, ["question", *(plain(each.tree.prompt.question) for each, _ in chosen[:_SHOWN])])
    if len(chosen) > _SHOWN:
        console.print(Text(f"... and {len(chosen) - _SHOWN} more"))
    what = f" that are {options.only}" if options.only else ""
    console.print(
        Text(
            f"\n{len(chosen)} of {len(trees)} trees{what}; one of them: deepgrpo inspect {run.directory} --step {step} "
            f"--prompt {chosen[0][0].number}"
        ),
        soft_wrap=True,  # keep the command on one line, ready to copy
    )
