"""The metrics of a run as columns for the page: every scalar of metrics.jsonl, and the four axes to plot it over."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_SECONDS = ("sample", "signals", "reward", "learn")
"""Phases of a training step. Evaluations and checkpoints are excluded: their frequency is not a property of the method."""
_DIGITS = 6
_NO_CURVES = ("step", "warnings")


def metric_columns(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Axes and curves of a run.

    Returns: `axes` with `step`, `tokens` (sampled), `updates` (optimizer steps) and `seconds` (training), each `[S]`;
    `curves`, key → `[S]`, None where a step lacks the key. Lists and the ledger are left out.
    """
    keys = sorted({key for each in metrics for key, value in each.items() if _is_number(value)} - set(_NO_CURVES))
    return {
        "axes": {
            "step": [each["step"] for each in metrics],
            "tokens": [_number(each.get("ledger/sampled_tokens")) or 0 for each in metrics],
            "updates": [_number(each.get("ledger/optimizer_steps")) or 0 for each in metrics],
            "seconds": [
                round(sum(_number(each.get(f"ledger/seconds_{phase}")) or 0 for phase in _SECONDS), 2) for each in metrics
            ],
        },
        "curves": {key: [_number(each.get(key)) for each in metrics] for key in keys if not key.startswith("ledger/")},
    }  # fmt: skip


def ledger_totals(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Ledger totals at the last step, by field of the ledger."""
    last = metrics[-1] if metrics else {}
    return {
        key.removeprefix("ledger/"): number
        for key, value in last.items()
        if key.startswith("ledger/") and (number := _number(value)) is not None
    }


def run_warnings(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Warnings of the run, in order."""
    return [
        {"step": each["step"], "text": str(text)}
        for each in metrics
        if isinstance(each.get("warnings"), list)
        for text in each["warnings"]
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    """A number with six significant digits, more than a screen shows; None for anything else."""
    if not _is_number(value) or not math.isfinite(value):
        return None
    if isinstance(value, int):
        return value
    return int(value) if value.is_integer() and abs(value) < 1e15 else float(f"{value:.{_DIGITS}g}")
