"""The storm as a command.

    PYTHONPATH=tests python -m storm docs/results/reliability [--work runs/storm] [--only kills races ...] [--share 0.1]

Each subject writes OUT/SUBJECT.json when it is done, and is skipped if that file is there: delete one to measure it again. An
interrupted subject goes on with the first case that is missing in WORK/SUBJECT.jsonl. At the end the page OUT.md is written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from commands import shared_process
from surroundings import clean_environment

from storm.answers import run_answers
from storm.damaged import run_damages
from storm.kills import run_kills
from storm.page import summary, write_page
from storm.race import run_races
from storm.starter import Starter
from storm.user_rewards import run_user_rewards

KILLS, REPEATS, ANSWERS = 50, 4, 10_000
SUBJECTS = ("kills", "races", "damages", "user_rewards", "answers")

Cases = Iterator[tuple[str, dict[str, Any]]]


def cases_of(subject: str, starter: Starter, folder: Path, share: float, everything: bool, done: Collection[str]) -> Cases:
    """The cases of a subject, or that share of them, without those that are done."""
    count: Callable[[int], int] = lambda full: max(2, round(full * share))  # noqa: E731
    if subject == "kills":
        return run_kills(starter, folder, count(KILLS), done=done)
    if subject == "races":
        return run_races(starter, folder, count(REPEATS), done=done)
    if subject == "damages":
        return run_damages(starter, folder, everything=everything, share=share, done=done)
    if subject == "user_rewards":
        return run_user_rewards(starter, folder, done=done)
    return run_answers(folder, count(ANSWERS), done=done)


def measure(subject: str, starter: Starter, work: Path, out: Path, share: float, everything: bool) -> None:
    """Run the cases of a subject that are not in its journal yet, and write its figures."""
    journal = work / f"{subject}.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    known = {each["name"]: each for each in map(json.loads, lines)}
    began = time.monotonic()
    with journal.open("a") as file:
        for name, facts in cases_of(subject, starter, work, share, everything, known.keys()):
            now = time.monotonic()
            known[name] = {"name": name, "seconds": round(now - began, 2), **facts}
            began = now
            file.write(json.dumps(known[name]) + "\n")
            file.flush()
            mark = "FAULT " if facts.get("fault") or facts.get("faults") or facts.get("differences") else ""
            print(f"{subject}: {mark}{name}", flush=True)
    cases = list(known.values())
    figures = {
        "subject": subject,
        "share": share,
        "seconds": round(sum(case["seconds"] for case in cases), 1),
        "summary": summary(subject, cases),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{subject}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures["summary"], indent=1), flush=True)


def main() -> int:
    """Run the subjects that have no figures yet. Returns 1 if a fault was found."""
    parser = argparse.ArgumentParser(prog="storm")
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/storm"))
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--share", type=float, default=1.0, help="share of the cases")
    parser.add_argument("--everything", action="store_true", help="every command for every damage")
    options = parser.parse_args()
    out, work = options.out.absolute(), options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="deepgrpo-storm-") as home:
        clean_environment(os.environ, Path(home))
        with shared_process():
            for subject in options.only:
                if not (out / f"{subject}.json").exists():
                    measure(subject, Starter(), work, out, options.share, options.everything)
    return write_page(out, out.with_suffix(".md"), SUBJECTS)


if __name__ == "__main__":
    sys.exit(main())
