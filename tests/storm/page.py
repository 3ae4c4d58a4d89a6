"""Figures of the storm, and the page of results that is generated from them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Facts = dict[str, Any]


def summary(subject: str, cases: Sequence[Facts]) -> Facts:
    """The figures of a subject."""
    return _answers(cases) if subject == "answers" else _runs(subject, cases)


def faults(figures: Facts) -> int:
    """The number of faults in a subject's figures."""
    return int(sum(figures["faults"].values()) + figures.get("other_results", 0))


def _runs(subject: str, cases: Sequence[Facts]) -> Facts:
    group = {
        "kills": lambda c: c["way"],
        "damages": lambda c: c["command"],
        "races": lambda c: c["name"].rpartition(" ")[0],
    }.get(subject, lambda c: "whole runs")
    rows: dict[str, Counter[str]] = {}
    for case in cases:
        row = rows.setdefault(group(case), Counter())
        row["cases"] += 1
        row[_outcome(subject, case)] += 1
    found = Counter(case["fault"] for case in cases if case["fault"])
    different = [case for case in cases if case.get("differences") or case.get("other_result")]
    said = Counter(_general(sentence) for case in cases for sentence in case.get("sentences", ()))
    return {
        "cases": len(cases), "rows": rows, "faults": found, "other_results": len(different),
        "phases": Counter(case["phase"] for case in cases) if subject == "kills" else {},
        "sentences": dict(said.most_common()),
        "details": [
            {key: case[key] for key in ("name", "fault", "differences", "other_result", "output", "said") if case.get(key)}
            for case in cases if case["fault"] or case in different
        ],
    }  # fmt: skip


def _general(sentence: str) -> str:
    """A sentence without the numbers, times and folders of one machine."""
    text = re.sub(r"/\S*/runs/", "runs/", sentence)
    text = re.sub(r"process \d+ on \S+ since \S+ [\d:]+", "process N on HOST since TIME", text)
    return re.sub(r"kill \d+", "kill N", text)


def _outcome(subject: str, case: Facts) -> str:
    if case["fault"]:
        return "fault"
    if case.get("differences") or case.get("other_result"):
        return "other result"
    if subject == "kills":
        return "identical after a sentence" if case["sentences"] else "identical"
    if subject == "races":
        return "identical"
    return "sentence" if case["code"] else "success"


def _answers(batches: Sequence[Facts]) -> Facts:
    judged: Counter[str] = Counter()
    problems: dict[str, Counter[str]] = {}
    kinds: Counter[str] = Counter()
    for batch in batches:
        kinds.update(batch["kinds"])
        judged.update(batch["judged"])
        for name, found in batch["problems"].items():
            problems.setdefault(name, Counter()).update(found)
    every = [fault for batch in batches for fault in batch["faults"]]
    rows = {name: {"cases": count, **problems.get(name, {})} for name, count in sorted(judged.items())}
    hangs = sum("hang of" in fault for fault in every)
    return {
        "cases": sum(kinds.values()), "rows": rows, "kinds": dict(kinds), "details": every,
        "faults": {"hang": hangs, "exception": len(every) - hangs, "executed": sum(batch["executed"] for batch in batches)},
    }  # fmt: skip


# ---------------------------------------------------------------- the page

TITLES = {
    "kills": "Kills",
    "races": "Races for one directory",
    "damages": "Damaged run directories",
    "user_rewards": "Hostile rewards of users",
    "answers": "Hostile answers",
}
TEXTS = {
    "kills": """\
A run is ended and resumed until it is done. Half of the kills are a SIGKILL before a certain file operation, spread over all
operations of a run; the others come at random moments: SIGKILL, SIGTERM, Ctrl-C, Ctrl-C twice, and a SIGKILL to a run that
had been killed and resumed. "Identical": metrics without times, weights, moments, trees, evaluations and state are, file by
file, those of the run that nobody disturbed, and no file is missing or left over.""",
    "races": """\
Several commands start at once on one run directory. One trains, the others are refused in a sentence, and the run is
identical to one that was alone.""",
    "damages": """\
Every file of a run directory is removed, emptied, cut, changed by a bit, filled with something else or replaced by a
directory or link, and its contents are given wrong values; then a command reads it: `train --resume` for each damage, and two
of the other commands in turn. "Other result": a resumed run ended with other weights, moments or state than without the
damage and did not say so.""",
    "user_rewards": """\
Whole runs with rewards that hang, exit, fork, close files, change the process or return nonsense.""",
    "answers": """\
Responses drawn by a seed: nasty LaTeX, Unicode, huge numbers, deep nesting, format strings, injections of code, very long
ones; bare, in a box, behind `####` and in tags. Timeouts of single checks score 0 and are intended. "Executed" counts batches
in which injected code left a file.""",
}


def write_page(folder: Path, page: Path, subjects: Sequence[str]) -> int:
    """Write the page of the subjects that have figures. Returns 1 if there is a fault."""
    parts = [
        "# Reliability\n",
        "What runs do when they are killed, raced, damaged and lied to. `make storm` measures what is missing in\n"
        f"`docs/results/{folder.name}/` and writes this page; a little of it is part of `make test`. All runs are of a model\n"
        "of a few thousand parameters, so that a run takes about a second.\n",
        "| subject | cases | faults | minutes |\n|---|---|---|---|",
    ]
    details, total = [], 0
    for subject in subjects:
        path = folder / f"{subject}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        figures = found["summary"]
        total += faults(figures)
        parts.append(f"| {TITLES[subject]} | {figures['cases']:,} | {faults(figures)} | {found['seconds'] / 60:.1f} |")
        details.append(f"\n## {TITLES[subject]}\n\n{TEXTS[subject]}\n\n{_table(figures)}{_lists(figures)}")
    page.write_text("\n".join(parts) + "\n" + "".join(details), encoding="utf-8")
    return int(total > 0)


def _table(figures: Facts) -> str:
    rows: dict[str, dict[str, int]] = figures["rows"]
    columns = ["cases", *sorted({key for row in rows.values() for key in row} - {"cases"})]
    lines = ["|  | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{row.get(key, 0):,}" for key in columns) + " |" for name, row in rows.items()
    ]
    return "\n".join(lines) + "\n"


def _lists(figures: Facts) -> str:
    text = (
        "\nFaults: "
        + (", ".join(f"{kind} {count}" for kind, count in figures["faults"].items() if count) or "none")
        + ".\n"
    )
    if figures.get("phases"):
        text += (
            "\nWhere the kills struck: "
            + ", ".join(f"{name} {count}" for name, count in figures["phases"].items())
            + ".\n"
        )
    if figures.get("kinds"):
        text += "\nKinds: " + ", ".join(f"{name} {count:,}" for name, count in figures["kinds"].items()) + ".\n"
    if figures.get("sentences"):
        text += "\nSentences:\n\n" + "".join(
            f"- {count} × {said}\n" for said, count in list(figures["sentences"].items())[:12]
        )
    if figures["details"]:
        text += "\nFaults and other results:\n\n" + "".join(f"- `{_short(each)}`\n" for each in figures["details"][:40])
    return text


def _short(detail: Any) -> str:
    told = detail if isinstance(detail, str) else "; ".join(f"{key}: {value}" for key, value in detail.items())
    return told.replace("`", "'").replace("\n", " ")[:300]
