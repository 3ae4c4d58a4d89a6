"""Evaluations of a run in a table: the first one and that of a checkpoint, with 95% intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from deepgrpo.config import Config
from deepgrpo.eval.pass_at_k import pass_at_k
from deepgrpo.runs.saved import SavedRun
from deepgrpo.stats import standard_error, wilson_interval

Z = 1.959963984540054
"""Normal quantile of a 95% interval."""

Line = Mapping[str, Any]
Row = Mapping[str, Any]


def evaluation_table(saved: SavedRun, config: Config, step: int) -> str:
    """The evaluations before the first step and at a step, or the last before it, in Markdown."""
    seen = [line for line in saved.metrics if _number(line.get("eval/greedy")) is not None and line["step"] <= step]
    if not seen:
        return "The run made no evaluation up to this step." + _final(saved, step)
    first, last = seen[0], seen[-1]
    lines = [last] if first is last else [first, last]
    answers = [_rows(saved, line["step"]) for line in lines]
    figures = [_figures(line, rows, config) for line, rows in zip(lines, answers, strict=True)]
    head = ["", *(f"step {line['step']}" for line in lines)]
    table = [head, ["---"] * len(head)]
    for name in figures[-1]:
        table.append([name, *(found.get(name, "–") for found in figures)])
    count = int(last.get("eval/prompts") or len(answers[-1]))
    text = "\n".join("| " + " | ".join(row) + " |" for row in table)
    text += f"\n\n{count:,} held-out questions (`eval.data` of the recipe), 95% intervals over questions"
    text += "; the training watched these figures, so the best of many checkpoints looks better than it is."
    if len(lines) == 2 and (difference := paired_difference(*answers)) is not None:
        mean, low, high, pairs = difference
        scale, unit = (100, " points") if _is_share(answers[0] + answers[1]) else (1, "")
        text += (
            f" Greedy, over the same {pairs:,} questions: {scale * mean:+.2f}{unit} "
            f"[{scale * low:+.2f}, {scale * high:+.2f}]."
        )
    if last["step"] != step:
        text += f" No evaluation was made at step {step}."
    return text + _final(saved, step)


def paired_difference(before: Sequence[Row], after: Sequence[Row]) -> tuple[float, float, float, int] | None:
    """Mean difference of the greedy reward over the questions of both, its 95% interval, and their number; None below two.

    Example: 0 and 1 before, 1 and 1 after give 0.5 [-0.48, 1.48] over 2 questions.
    """
    then = {row["id"]: float(row["greedy_reward"]) for row in before}
    differences = [float(row["greedy_reward"]) - then[row["id"]] for row in after if row["id"] in then]
    if len(differences) < 2:
        return None
    mean, half = math.fsum(differences) / len(differences), Z * standard_error(differences)
    return mean, mean - half, mean + half, len(differences)


def _figures(line: Line, rows: Sequence[Row], config: Config) -> dict[str, str]:
    greedy, count = float(line["eval/greedy"]), int(line.get("eval/prompts") or len(rows))
    share = _is_share(rows) if rows else 0 <= greedy <= 1
    if share and count:
        found = {"greedy accuracy": _share(greedy, *wilson_interval(greedy * count, count))}
    else:
        found = {"greedy reward": _mean(greedy, _number(line.get("eval/greedy_se")))}
    sampled = _number(line.get("eval/sampled"))
    if sampled is not None:
        found["sampled accuracy" if share else "sampled reward"] = (_percent if share else _mean)(
            sampled, _number(line.get("eval/sampled_se"))
        )
    draws = [[r > config.explore.success_threshold for r in row.get("sampled_rewards", ())] for row in rows]
    for k in config.eval.k if sampled is not None else ():
        value = _number(line.get(f"eval/pass@{k}"))
        if value is not None:
            each = [pass_at_k(len(own), sum(own), k) for own in draws if len(own) >= k]
            found[f"pass@{k}"] = _percent(value, standard_error(each) if len(each) > 1 else None)
    length = _number(line.get("eval/length"))
    if length is not None:
        found["mean length, tokens"] = f"{length:,.1f}"
    return found


def _final(saved: SavedRun, step: int) -> str:
    """The evaluation on untouched questions by `deepgrpo compare`, if it is of this step."""
    try:
        found = json.loads(saved.paths.final.read_text(encoding="utf-8"))
        greedy, count = float(found["metrics"]["eval/greedy"]), int(found["questions"])
        if found["step"] != step or not 0 <= greedy <= 1:
            return ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return (
        f"\n\nOn {count:,} further questions that the training never watched: greedy accuracy "
        f"{_share(greedy, *wilson_interval(greedy * count, count))}."
    )


def _rows(saved: SavedRun, step: int) -> list[Row]:
    """The answers of an evaluation; empty if their file is missing or damaged."""
    try:
        lines = saved.paths.eval(step).read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        return found if all(_number(row["greedy_reward"]) is not None and "id" in row for row in found) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _is_share(rows: Sequence[Row]) -> bool:
    """True if every greedy reward is 0 or 1."""
    return bool(rows) and all(row["greedy_reward"] in (0, 1) for row in rows)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None


def _share(value: float, low: float, high: float) -> str:
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"


def _percent(value: float, error: float | None) -> str:
    if error is None:
        return f"{value:.1%}"
    return _share(value, max(0.0, value - Z * error), min(1.0, value + Z * error))


def _mean(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} [{value - Z * error:.4g}, {value + Z * error:.4g}]"
