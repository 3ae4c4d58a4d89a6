"""Hostile rewards: each one trains or ends in a sentence. Here those that one process survives; all of them in whole runs:
`hostile.rewards.run_hostile_rewards`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deepgrpo.config import UserReward
from deepgrpo.errors import ConfigError, RewardError
from deepgrpo.feedback import Score
from deepgrpo.records import Prompt
from deepgrpo.rewards.user import UserFunctionReward
from hostile.reward_cases import BAD, CASES, Case


@pytest.mark.parametrize("case", [case for case in CASES if not case.alone], ids=lambda case: case.name)
def test_it_scores_or_ends_in_a_sentence(case: Case, tmp_path: Path) -> None:
    rows = [Prompt(str(i), f"{i}?", (1,), f"{i}?", str(i), {"question": f"{i}?", "tags": ["a", "b"]}) for i in range(2)]
    name, _, function = case.reference.partition(":")
    (tmp_path / name).write_text(case.source)
    config = UserReward(function=f"{tmp_path / name}:{function}", timeout_s=case.timeout_s)
    if case.says:
        with pytest.raises((RewardError, ConfigError)) as error:
            UserFunctionReward.build(config, None).score(rows, ["0", "1"], [(1,), (2,)])
        assert re.search(case.says, str(error.value))
        return
    reward = UserFunctionReward.build(config, None)
    try:
        scores = reward.score(rows, ["0", "1"], [(1,), (2,)])
    finally:
        reward.close()
    if case.scores:
        assert scores == [expected(each) for each in case.scores]
    assert rows[0].columns["tags"] == ["a", "b"]


def expected(value: object) -> Score:
    if value is None:
        return Score(0.0, parsed=False)
    if value == BAD:
        return Score(0.0, problem="not finite")
    assert isinstance(value, float)
    return Score(value)
