"""Output of `deepgrpo eval`: the table, the JSON file and the rows file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from deepgrpo.errors import DataError
from deepgrpo.runs.text import json_text
from deepgrpo.terminal import print_columns


def print_table(results: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print one column per data set, one row per figure: accuracies in percent, `±` one standard error over questions.

    Args:
        results: data set → {"metrics": `EvalResult.metrics`, "tokens_per_s": float or None, ...}.
        console: a terminal or a file. A file gets the whole width of the table.
    """
    print_columns(console, ("", *results), _rows(results))


def write_json(path: str, figures: Mapping[str, Any]) -> None:
    """Write the figures of all data sets. Raises DataError if the file cannot be written."""
    _write(path, "json", json_text(figures, indent=2, allow_nan=False) + "\n")


def write_rows(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one line of JSON per question. Raises DataError if the file cannot be written."""
    _write(path, "rows", "".join(json_text(row, allow_nan=False) + "\n" for row in rows))


def _write(path: str, option: str, text: str) -> None:
    try:
        Path(path).expanduser().write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"the results cannot be written: {error}; name another file with --{option}") from error


def _rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    all_metrics = [result["metrics"] for result in results.values()]
    for label, name, form in _FIGURES:
        if name in all_metrics[0]:
            rows.append((label, *(form(metrics[name]) for metrics in all_metrics)))
        if name == "eval/sampled_unparsed":
            for each in sorted(
                (n for n in all_metrics[0] if "@" in n), key=lambda n: ("maj" in n, int(n.split("@")[1]))
            ):
                rows.append((each.removeprefix("eval/"), *(_percent(metrics[each]) for metrics in all_metrics)))
    for name in dict.fromkeys(name for metrics in all_metrics for name in metrics if name.startswith("eval/reward/")):
        cells = (f"{metrics[name]:.3f}" if name in metrics else "" for metrics in all_metrics)
        rows.append((f"reward {name.removeprefix('eval/reward/')}", *cells))
    sources = dict.fromkeys(name for metrics in all_metrics for name in metrics if name.startswith("eval/source/"))
    for name in (name for name in sources if name.endswith("/greedy")):
        label = name.removeprefix("eval/source/").removesuffix("/greedy")
        rows.append((f"{label} %", *(_percent(metrics[name]) if name in metrics else "" for metrics in all_metrics)))
        rows.append(("  ±", *(_percent(metrics[f"{name}_se"]) if name in metrics else "" for metrics in all_metrics)))
    rows.append(("tokens/s", *(f"{result['tokens_per_s'] or 0:.0f}" for result in results.values())))
    return rows


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


def _whole(x: float) -> str:
    return f"{x:.0f}"


_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("questions", "eval/prompts", _whole),
    ("greedy %", "eval/greedy", _percent),
    ("  ±", "eval/greedy_se", _percent),
    ("  tokens", "eval/length", _whole),
    ("  truncated %", "eval/truncated", _percent),
    ("  unparsed %", "eval/unparsed", _percent),
    ("sampled %", "eval/sampled", _percent),
    ("  ±", "eval/sampled_se", _percent),
    ("  tokens", "eval/sampled_length", _whole),
    ("  truncated %", "eval/sampled_truncated", _percent),
    ("  unparsed %", "eval/sampled_unparsed", _percent),
    ("failed checks", "eval/problems", _whole),
)
