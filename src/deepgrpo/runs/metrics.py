"""metrics.jsonl: one JSON object per step, written as the run goes and readable while it is written.

    {"step": 12, "main/reward": 0.41, ..., "ledger/sampled_tokens": 812000, ..., "warnings": []}

A line torn by a kill, or still being written, is skipped by every reader.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from deepgrpo.errors import CheckpointError
from deepgrpo.ledger import StepReport
from deepgrpo.runs.files import remedy, replace_file

Line = dict[str, Any]

_LAST_STEP = 10**12


def step_json(report: StepReport) -> Line:
    """A step as a line of metrics.jsonl: step, metrics, `ledger/...` totals, warnings.

    NaN and infinities become None, which JSON can express.
    """
    ledger = {f"ledger/{key}": value for key, value in report.ledger.as_dict().items()}
    values = {key: _plain(value) for key, value in {**report.metrics, **ledger}.items()}
    return {"step": report.step, **values, "warnings": list(report.warnings)}


def write_step(file: TextIO, report: StepReport) -> Line:
    """Append a step to an open metrics.jsonl and flush it; returns the line."""
    line = step_json(report)
    file.write(json.dumps(line, allow_nan=False) + "\n")
    file.flush()
    return line


def read_metrics(path: Path) -> list[Line]:
    """The lines of a metrics.jsonl by step; of two lines with the same step, the later one counts.

    Raises OSError if the file cannot be read.
    """
    found: dict[int, Line] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            if (line := _parse(text)) is not None:
                found[line["step"]] = line
    return [found[step] for step in sorted(found)]


def newest_metrics(path: Path) -> Mapping[str, Any]:
    """The last line of a metrics.jsonl, with the last known `eval/greedy`; empty if there is no line yet.

    Reads from the end, so it may be called every second on a long run.
    """
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    last: Line = {}
    for text in reversed(texts):
        line = _parse(text)
        if line is None:
            continue
        last = last or line
        if line.get("eval/greedy") is not None:
            return {**last, "eval/greedy": line["eval/greedy"]}
    return last


def truncate_metrics(path: Path, step: int) -> int:
    """Drop the lines after `step` and any torn line; returns how many were dropped. A missing file is fine.

    A resumed run repeats the steps after its checkpoint; their old lines would otherwise be duplicates.

    Raises CheckpointError if the file cannot be rewritten.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            line = _parse(text)
            if text.endswith("\n") and line is not None and line["step"] <= step:
                kept.append(text)
            else:
                dropped += 1
    if not dropped:
        return 0
    try:
        replace_file(path, "".join(kept))
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be cut back to step {step}: {error}; {remedy(error)}, and repeat the command"
        ) from error
    return dropped


def _parse(text: str) -> Line | None:
    """A line of metrics.jsonl; None if it is torn or has no step. A value that no step writes, such as a text, becomes None."""
    try:
        line: Line = json.loads(text)
        step = line["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < _LAST_STEP:
        return None
    found = {key: _known(value) for key, value in line.items()}
    if "warnings" in line:
        warnings = line["warnings"]
        found["warnings"] = [str(each) for each in warnings] if isinstance(warnings, list) else []
    return found


def _known(value: Any) -> Any:
    """A finite number or truth value, a list of them and of None, or None."""
    if isinstance(value, list):
        return value if all(each is None or _is_number(each) for each in value) else None
    return value if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _plain(value: Any) -> Any:
    """A number or a list of numbers as JSON; numpy and torch scalars included."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
