"""Answers and their right verdicts, as data: one line of a JSONL file per case.

Fields: output, gold, format (place of the answer, or the marker), right (1, 0, or null for "not comparable"), why. A gym
row is right if the number handed to the verifier is the gold; a vote row, if output and gold vote alike.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepgrpo.config import ExactReward, MathReward
from deepgrpo.feedback import Score
from deepgrpo.prompts.gym import extract_answer
from deepgrpo.records import Prompt
from deepgrpo.rewards.exact import ExactMatchReward
from deepgrpo.rewards.math_answer import MathAnswerReward
from deepgrpo.rewards.workers import NotComparableError

HERE = Path(__file__).parent


def rows(name: str) -> list[dict]:
    lines = (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def labelled(name: str) -> list:
    return [pytest.param(row, id=f"{name}-{number}") for number, row in enumerate(rows(name), start=1)]


class InThisProcess:
    """Workers without processes."""

    def run(self, checks):
        return [self._one(check) for check in checks]

    def _one(self, check):
        try:
            value, found = check()
        except NotComparableError:
            return Score(0.0, problem="not comparable")
        return Score(float(value), parsed=found)


def math_reward(answer_format: str) -> MathAnswerReward:
    reward = MathAnswerReward(MathReward(answer_format=answer_format))
    reward._workers = InThisProcess()
    return reward


def asked(gold: str) -> Prompt:
    return Prompt("p", "text", (1,), "q", gold, {})


def math(row: dict) -> float | None:
    (score,) = math_reward(row["format"]).score([asked(row["gold"])], [row["output"]], [(1,)])
    assert score.problem in (None, "not comparable")
    return None if score.problem else score.value


@pytest.mark.parametrize("row", labelled("math"))
def test_math(row):
    assert math(row) == row["right"], row


@pytest.mark.parametrize("row", labelled("gym"))
def test_gym(row):
    answer, found = extract_answer(row["output"], row["gold"])
    assert float(found and answer == row["gold"]) == row["right"], (row, answer)


@pytest.mark.parametrize("row", labelled("exact"))
def test_exact(row):
    (score,) = ExactMatchReward(ExactReward(marker=row["format"])).score([asked(row["gold"])], [row["output"]], [(1,)])
    assert score.value == row["right"], row


@pytest.mark.parametrize("row", labelled("vote"))
def test_vote(row):
    reward = math_reward(row["format"])
    one, two = (reward.vote(asked("1"), row[name]) for name in ("output", "gold"))
    assert one is not None and two is not None
    assert float(one == two) == row["right"], (row, one, two)


@pytest.mark.xfail(strict=True, reason="known to be judged wrongly; see the why of each row")
@pytest.mark.parametrize("row", labelled("wrong"))
def test_still_wrong(row):
    assert math(row) == row["right"], row


def test_there_are_enough_rows():
    assert sum(len(rows(name)) for name in ("math", "gym", "exact", "vote")) >= 150
