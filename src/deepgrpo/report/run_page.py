"""Collect everything a page shows about a run, in one pass over its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from deepgrpo.errors import DataError
from deepgrpo.report.blocks import TreeIndex, choose_steps, tree_blocks
from deepgrpo.report.curves import ledger_totals, metric_columns, run_warnings
from deepgrpo.report.pivots import PivotOutcome, pivot_outcomes, q_mass, q_over_time, reliability, rescue_over_time
from deepgrpo.report.tokens import TokenTexts, read_tokens
from deepgrpo.runs.saved import SavedRun
from deepgrpo.runs.trees import SavedTree

OnProgress = Callable[[int, int], None]
"""Callback that receives the number of steps read and their total."""


@dataclass
class RunPage:
    """A run in the page: `data` is decoded at once, `blocks` on demand."""

    data: dict[str, Any]
    blocks: list[str]
    notes: list[str] = field(default_factory=list)
    """Sentences about what was left out or could not be read."""


def build_page(run: SavedRun, max_trees: int, progress: OnProgress = lambda done, total: None) -> RunPage:
    """Read a run. The pivot figures use all its trees; the page embeds at most `max_trees` of them."""
    notes: list[str] = []
    texts = read_tokens(run)
    metrics = run.metrics
    index = TreeIndex()
    blocks: list[str] = []
    outcomes: list[PivotOutcome] = []
    masses: dict[int, tuple[list[float], int]] = {}
    counts: dict[int, int] = {}
    for step in list(run.tree_files):
        try:
            counts[step] = run.count_trees(step)
        except DataError as error:
            notes.append(str(error))
    embedded = set(choose_steps(counts, max_trees)) if max_trees else set()

    def trees() -> Iterator[SavedTree]:
        for done, step in enumerate(counts):
            progress(done, len(counts))
            found: list[SavedTree] = []
            try:
                found.extend(run.trees(step))
            except DataError as error:
                notes.append(str(error))
            masses[step] = q_mass(each.tree for each in found)
            for each in found:
                outcomes.extend(pivot_outcomes(each.tree, step, run.success_threshold))
            if step in embedded:
                yield from found
        progress(len(counts), len(counts))

    blocks.extend(tree_blocks(trees(), index, texts, run.success_threshold))
    notes += _notes(run, texts, counts, embedded, max_trees)
    explore = run.section("explore")
    data = {
        "path": str(run.directory), "name": run.name, "strategy": str(explore.get("type", "?")),
        "seed": run.section("run").get("seed"), "planned": run.section("run").get("steps"),
        "gamma": explore.get("gamma"), "threshold": run.success_threshold,
        **metric_columns(metrics), "ledger": ledger_totals(metrics), "warnings": run_warnings(metrics),
        "recipe": run.recipe, "notes": notes,
        "pivots": {
            "q": q_over_time(masses), "rescue": rescue_over_time(metrics), "reliability": reliability(outcomes, metrics),
            "steps": len(counts),
        },
        "trees": {
            "index": index.packed() if blocks else None, "saved": sum(counts.values()), "shown": len(index.step),
            "blocks": len(blocks), "tokens": texts is not None, "specials": sorted(texts.specials) if texts else [],
        },
    }  # fmt: skip
    return RunPage(data, blocks, notes)


def _notes(run: SavedRun, texts: TokenTexts | None, counts: dict[int, int], embedded: set[int], limit: int) -> list[str]:
    if not run.tree_files:
        return [run.why_no_trees()]
    notes = []
    total = sum(counts.values())
    if not limit:
        notes.append(f"{run.name}: no trees in the page, as --max-trees is 0")
    elif len(embedded) < len(counts):
        shown = sum(counts[step] for step in embedded)
        notes.append(
            f"{run.name}: the page has {shown:,} of {total:,} saved trees, those of {len(embedded)} of {len(counts)} steps; "
            f"--max-trees {total} takes all, and the page grows with them"
        )
    if texts is None:
        notes.append(
            f"{run.name}: no tokenizer.json in its checkpoints, its start or its model directory, so texts are shown whole, "
            "without tokens and segments"
        )
    return notes
