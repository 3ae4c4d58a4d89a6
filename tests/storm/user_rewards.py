"""Hostile rewards of users: a whole run with each of the collection in `hostile/reward_cases.py`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from hostile.reward_cases import CASES
from hostile.rewards import train_with
from storm.runs import new_place
from storm.starter import Starter


def run_user_rewards(starter: Starter, folder: Path, done: Collection[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (case, facts)."""
    for case in CASES:
        if case.name in done:
            continue
        found = train_with(case, new_place(folder, "user-reward"), starter)
        said = (found.out + found.err)[-1000:] if found.fault else ""
        yield case.name, {"fault": found.fault, "code": found.code, "said": said}
