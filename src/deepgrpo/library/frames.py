"""Runs as data frames: metrics by step, and saved trees by node. Needs pandas (the extra `frames`), no torch."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deepgrpo.errors import DataError, requires_extra
from deepgrpo.library.run import as_run
from deepgrpo.records import ROOT
from deepgrpo.runs.facts import is_rescued
from deepgrpo.runs.saved import SavedRun
from deepgrpo.runs.trees import SavedTree


def load_run(run: str | Path | SavedRun) -> Any:
    """The metrics of a run as a data frame: one row per step, one column per metric (docs/metrics.md).

    Args:
        run: a run directory, or what `train` returned. A run that is still going may be read.

    Raises DataError if it is no run, MissingExtraError without pandas.
    """
    frame = _pandas("load_run").DataFrame(as_run(run).metrics)
    return frame.set_index("step") if len(frame) else frame


def load_trees(run: str | Path | SavedRun, steps: int | Iterable[int] | None = None) -> Any:
    """The saved trees of a run as a data frame: one row per node.

    Columns: step, tree (its place in the step), prompt (its id), question, answer; node, parent (-1: the prompt), offset
    (tokens of the parent before the branch), stream (main, branch), pivot, ratio (depth of the pivot), rescued (a branch of the
    pivot succeeds and beats the rollout it left), reward, parsed, finish, tokens (own ones), advantage (NaN: not trained), text
    (the whole response), version (optimizer steps behind the policy).

    Args:
        run: a run directory, or what `train` returned.
        steps: a step or several; default: all that were saved (`log.trees_every`).

    Raises DataError if the run has no trees, or none of a step; MissingExtraError without pandas.
    """
    pandas, found = _pandas("load_trees"), as_run(run)
    files = found.tree_files
    if not files:
        raise DataError(found.why_no_trees())
    wanted = list(files) if steps is None else [steps] if isinstance(steps, int) else list(steps)
    for step in wanted:
        if step not in files:
            known = ", ".join(map(str, files))
            raise DataError(f"{found.directory} has no saved trees of step {step}; it has those of {known}")
    threshold = found.success_threshold
    return pandas.DataFrame([row for step in wanted for saved in found.trees(step) for row in _nodes(saved, threshold)])


def _nodes(saved: SavedTree, threshold: float) -> Iterator[dict[str, Any]]:
    tree = saved.tree
    rescued = [pivot.parent != ROOT and is_rescued(tree, number, threshold) for number, pivot in enumerate(tree.pivots)]
    for number, node in enumerate(tree.nodes):
        spans = saved.advantages(number)
        trained = sum(span.end - span.start for span in spans)
        advantage = sum(span.advantage * (span.end - span.start) for span in spans) / trained if trained else math.nan
        yield {
            "step": saved.step, "tree": saved.number, "prompt": tree.prompt.id, "question": tree.prompt.question,
            "answer": tree.prompt.answer, "node": number, "parent": node.parent, "offset": node.offset, "stream": node.stream,
            "pivot": node.pivot, "ratio": tree.pivots[node.pivot].ratio, "rescued": rescued[node.pivot],
            "reward": node.reward, "parsed": node.score.parsed, "finish": node.finish, "tokens": len(node.tokens),
            "advantage": advantage, "text": node.text, "version": node.version,
        }  # fmt: skip


def _pandas(wanted_by: str) -> Any:
    with requires_extra("pandas", "frames", wanted_by):
        return importlib.import_module("pandas")
