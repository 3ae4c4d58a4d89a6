"""The penalty for responses near the length limit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trees import make_tree

from deepgrpo.config import OverlongConfig
from deepgrpo.feedback import Score
from deepgrpo.records import Prompt
from deepgrpo.rewards.base import judge
from deepgrpo.rewards.overlong import OverlongPenalty

PROMPT = Prompt("p", "text", (1, 2, 3), "question")


def penalty(cache: int, amount: float = 1.0, longest: int = 10, context: int = 100) -> OverlongPenalty:
    return OverlongPenalty(OverlongConfig(cache=cache, penalty=amount), longest, context)


@pytest.mark.parametrize(
    ("length", "lost"),
    # limit 10, cache 4: the line begins behind token 6; (8 - 6) / 4 = 1/2
    [(1, 0.0), (6, 0.0), (7, -0.25), (8, -0.5), (9, -0.75), (10, -1.0)],
)
def test_by_hand(length: int, lost: float) -> None:
    assert penalty(4)(PROMPT, length) == lost
    assert penalty(4, 0.5)(PROMPT, length) == lost / 2


def test_the_papers_own_numbers() -> None:
    # 20480 tokens at most, the last 4096 of them penalised: half of it at 16384 + 2048
    papers = penalty(4096, longest=20480, context=40960)
    assert [papers(PROMPT, n) for n in (16384, 18432, 20480)] == [0.0, -0.5, -1.0]


def test_a_long_prompt_lowers_the_limit() -> None:
    # a context of 10 leaves 7 tokens to a prompt of 3: (5 - 3) / 4
    assert penalty(4, longest=100, context=10)(PROMPT, 5) == -0.5
    # it leaves 3, fewer than the cache: the line goes from 0 to 3
    assert [penalty(4, context=6)(PROMPT, n) for n in (1, 2, 3)] == pytest.approx([-1 / 3, -2 / 3, -1])


@given(
    cache=st.integers(1, 50), amount=st.floats(0.01, 5), longest=st.integers(1, 60), context=st.integers(4, 60),
    length=st.integers(1, 60),
)  # fmt: skip
def test_it_falls_from_zero_to_the_penalty(cache: int, amount: float, longest: int, context: int, length: int) -> None:
    lost, limit = penalty(cache, amount, longest, context), min(longest, context - 3)
    length = min(length, limit)
    assert -amount <= lost(PROMPT, length) <= 0 and lost(PROMPT, length) <= lost(PROMPT, length - 1)
    assert lost(PROMPT, limit) == -amount
    if length <= limit - cache:
        assert lost(PROMPT, length) == 0


class Right:
    def score(self, prompts: object, completions: list[str], completion_ids: object) -> list[Score]:
        return [Score(1.0, parsed=text != "?") for text in completions]

    def close(self) -> None: ...


def test_it_is_added_to_every_reward_and_changes_nothing_else() -> None:
    """Lengths 5, 8 and 10 of 10: right, right but long, and cut off (worth 0 by itself)."""
    rows = ([PROMPT] * 3, ["a", "?", "c"], [(1,) * 5, (1,) * 8, (1,) * 10], ["stop", "stop", "length"])
    scores = judge(Right(), 0.0, *rows, penalty=penalty(4))  # type: ignore[arg-type]
    assert scores == [Score(1.0), Score(0.5, parsed=False), Score(-1.0, checked=False)]
    assert [score.value for score in judge(Right(), None, *rows, penalty=penalty(4))] == [1.0, 0.5, 0.0]  # type: ignore[arg-type]


def test_metrics_count_the_whole_path_of_a_branch() -> None:
    """Limit 10, cache 4. Rollouts of 8 and 4 tokens lose 1/2 and 0; a branch of 3 tokens behind the 7th of a rollout, 1."""
    tree = make_tree([(8, 0.0), (4, 1.0)], [(0, 7, [(3, 1.0), (1, 0.0)])])
    assert penalty(4).metrics([tree]) == {"main/overlong": -0.25, "branch/overlong": -0.75}
    assert penalty(4).metrics([make_tree([(8, 0.0), (4, 1.0)])]) == {"main/overlong": -0.25}


def test_metrics_leave_segments_out() -> None:
    """Rollouts of 8 and 7 tokens lose 1/2 and 1/4; the first is a segment, not a response, and is not counted."""
    tree = make_tree([(8, 0.0), (7, 1.0)])
    tree = replace(tree, nodes=(replace(tree.nodes[0], finish="segment"), tree.nodes[1]))
    assert penalty(4).metrics([tree]) == {"main/overlong": -0.25}
