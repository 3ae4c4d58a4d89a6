"""Hostile answers: a few of the ten thousand of `make storm`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from storm.answers import KINDS, hostile_answers, run_answers

pytestmark = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning_gym is not installed")


def test_some_hostile_answers(tmp_path: Path) -> None:
    (found,) = [facts for _, facts in run_answers(tmp_path, 30)]
    assert (found["faults"], found["executed"]) == ([], 0)
    assert len(found["kinds"]) >= 5 and sum(found["judged"].values()) == 90


def test_answers_are_drawn_by_the_seed() -> None:
    drawn = hostile_answers(500, "canary")
    assert drawn == hostile_answers(500, "canary") and drawn != hostile_answers(500, "canary", seed=1)
    assert {kind for kind, _ in drawn} == set(KINDS)
