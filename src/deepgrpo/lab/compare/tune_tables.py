"""Tables and sentences of the tuning stage, from the result of `tune.tuning`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepgrpo.lab.compare.cells import ComparisonTable, percent
from deepgrpo.lab.compare.grid import label


def tuning_table(found: Mapping[str, Any]) -> ComparisonTable:
    """One row per arm and trial."""
    rows = []
    for arm, each in found["arms"].items():
        for trial in each["trials"]:
            notes = ["chosen"] if trial["values"] == each["chosen"] else []
            notes += [f"diverged: {', '.join(map(str, trial['diverged']))}"] if trial["diverged"] else []
            seeds = ("–" if figure is None else percent(figure) for figure in trial["seeds"].values())
            mean = "–" if trial["mean"] is None else percent(trial["mean"])
            rows.append((arm, trial["name"], mean, *seeds, "; ".join(notes)))
    columns = ("arm", "trial", "mean", *(f"seed {seed}" for seed in found["seeds"]), "")
    return ComparisonTable(f"Tuning: {found['metric']} accuracy on watched questions, %", columns, tuple(rows))


def choice_lines(found: Mapping[str, Any]) -> list[str]:
    """Sentences on the chosen values, then on choices at the edge of the grid; arms with the same choice share a sentence."""
    choices: dict[str, list[str]] = {}
    edges: dict[str, list[str]] = {}
    for arm, each in found["arms"].items():
        fixed = [f"{key} = {label(value)}" for key, value in each["fixed"].items()]
        chosen = [f"{key} = {label(value)}" for key, value in (each["chosen"] or {}).items()]
        if each["chosen"] is None:
            choices.setdefault("no choice, as its trials are not complete or have no figure", []).append(arm)
            continue
        parts = [f"{', '.join(chosen)}"] if chosen else []
        parts += [f"not tuned, as the arm sets it: {', '.join(fixed)}"] if fixed else []
        choices.setdefault("; ".join(parts), []).append(arm)
        for key in each["edges"]:
            tried = [value for value in found["grid"][key] if not isinstance(value, str)]
            side = "lowest" if each["chosen"][key] == min(tried) else "highest"
            edges.setdefault(
                f"{key} = {label(each['chosen'][key])} is the {side} value tried, so a better one may lie outside the "
                f"grid; extend tune.grid.{key} and repeat the command", [],
            ).append(arm)  # fmt: skip
    return [f"{', '.join(arms)}: {said}" for said, arms in (*choices.items(), *edges.items())]
