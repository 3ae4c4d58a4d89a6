"""The lookup task: questions, tables, written episodes, progress, and its environment."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgrpo.config import LookupData, OracleExplore
from deepgrpo.envs.lookup import LookupEnvironment
from deepgrpo.errors import ConfigError, DataError
from deepgrpo.explore.base import Limits, main_pivot
from deepgrpo.explore.oracle import OracleStrategy
from deepgrpo.feedback import Score
from deepgrpo.prompts import lookup, synthetic
from deepgrpo.prompts.lookup import follow, observation, parse, right_lookups, turns, written_episode
from deepgrpo.prompts.lookup_task import LookupTask
from deepgrpo.records import Node, Prompt, Tree

#        0123456789
TABLE = {"f": "4907381265", "g": "1111222245", "h": "0050000030", "i": "9876543210"}
QUESTION = "3fgh:"  # f3 = 7, g7 = 2, h2 = 5
PROMPT = Prompt("p", QUESTION, (2,), QUESTION, columns={"table": TABLE})


def test_a_question_by_hand() -> None:
    assert parse(QUESTION) == ("3", "fgh")
    assert right_lookups(QUESTION, TABLE) == (["f3?", "g7?", "h2?"], "5")
    asked = ["f3?", "h8?", "z3?", "f33?", "3f?", "?", "ff?", "#5?", "\x00?", "f٣?"]
    assert [observation(TABLE, each) for each in asked] == ["7;", "3;", *["!;"] * 8]
    with pytest.raises(DataError, match="is not a question of the lookup task"):
        parse("fgh:")


@pytest.mark.parametrize(
    ("episode", "hops", "error", "solved"),
    [
        ("f3?7;g7?2;h2?5;#5", 3, None, True),
        ("f3?7;g7?2;h2?5;#5 ", 3, None, True),
        ("f3?7;g8?4;h4?0;g7?2;h2?5;#5", 3, None, True),  # recovered after two lookups
        ("f3?7;g7?!;h2?5;#5", 1, 5, False),  # malformed by a special token, which the text does not show
        ("f3?7;g7?!;g7?2;h2?5;#5", 3, None, True),
        ("f3?7;i7?2;g7?2;z?!;h2?5;#5", 3, None, True),  # superfluous ones are no errors once the right one follows
        ("f3?7;g7?2;h2?5;i5?4;#5", 3, None, True),
        ("", 0, None, False),
        ("f3?7;g", 1, None, False),  # cut off while right
        ("f3?7;g7?2;h2?5;#", 3, None, False),
        ("f3?7;g8?4;h4?0;#0", 1, 5, False),
        ("f3?7;g8?4;h4?0;", 1, 5, False),
        ("f3?7;g7?2;#5", 2, 10, False),  # a right answer that was not looked up
        ("#5", 0, 0, False),
        ("f3?7;g7?2;h2?5;#7", 3, 15, False),
        ("f3?7;g7?2;h2?5;#55", 3, 15, False),
        ("g7?2;h2?5;#5", 0, 0, False),
        ("h2?5;g7?2;f3?7;#5", 1, 15, False),  # in the wrong order
    ],
)
def test_progress_by_hand(episode: str, hops: int, error: int | None, solved: bool) -> None:
    assert follow(QUESTION, TABLE, episode) == (hops, error, solved)
    task = LookupTask(LookupData())
    assert task.first_error(PROMPT, episode) == error and task.verify(PROMPT, episode).value == solved
    assert task.verify(PROMPT, episode).parsed == ("#" in episode)


def test_an_episode_of_another_table_is_refused() -> None:
    with pytest.raises(DataError, match=r"'f3\?' is answered by '7;'"):
        list(turns(TABLE, "f3?8;"))
    with pytest.raises(DataError, match=r'has no table to look up; set data\.type = "lookup"'):
        lookup.table_of(Prompt("p", "q", (1,), "q"))


def test_questions_and_tables_are_uniform() -> None:
    data = LookupData(hops=4, functions=3)
    rows = [synthetic.make(i, data) for i in range(500)]
    names = [parse(row.question).functions for row in rows]
    for place, name in itertools.product(range(4), "fgh"):
        assert abs(sum(each[place] == name for each in names) / 500 - 1 / 3) < 0.08
    digits = np.array([list("".join(row.columns["table"].values())) for row in rows]).astype(int)
    assert digits.shape == (500, 30)  # three functions of ten values
    assert np.abs(np.bincount(digits.ravel(), minlength=10) / digits.size - 0.1).max() < 0.01
    assert rows[7] == synthetic.make(7, data) != synthetic.make(7, data.model_copy(update={"seed": 1}))


def test_the_splits_share_no_question() -> None:
    train, test = (
        {synthetic.make(i, LookupData(hops=2, functions=4, split=split)).question for i in range(300)}
        for split in ("train", "test")
    )
    assert not train & test and len(train) > 80 and len(test) > 10
    task = LookupTask(LookupData(hops=2, functions=4))
    assert (task.count, task.shape) == (160, "data.hops = 2 and data.functions = 4")


@pytest.mark.parametrize(("errors", "recoveries"), [(0.3, 0.4), (0.5, 1.0), (1.0, 0.0)])
def test_the_law_of_written_episodes(errors: float, recoveries: float) -> None:
    """Right with the probability (1 - errors · (1 - recoveries)) ** hops; recovered at once in 1 of (hops left + 1)."""
    data, count = LookupData(hops=3, errors=errors, recoveries=recoveries), 600
    task = LookupTask(data)
    rows = [synthetic.make(i, data) for i in range(count)]
    solved, first_wrong, at_once = 0, 0, 0
    for row in rows:
        table, episode = row.columns["table"], row.columns["solution"]
        right, answer = right_lookups(row.question, table)
        found = follow(row.question, table, episode)
        asked = [turn.text for turn in turns(table, episode)]
        assert found.solved == (found.error is None) and asked[-1].startswith("#")
        assert row.answer == answer and task.answer(row.question) == answer
        solved += found.solved
        first_wrong += asked[0] != right[0]
        at_once += asked[0] != right[0] and asked[1] == right[0]
    right_share = (1 - errors * (1 - recoveries)) ** 3
    assert abs(solved / count - right_share) <= 3 * (right_share * (1 - right_share) / count) ** 0.5 + 1e-3
    assert abs(first_wrong / count - errors) <= 3 * (errors * (1 - errors) / count) ** 0.5
    # 0.03: a wrong result that is carried on may ask for it by chance
    assert abs(at_once / count - errors * recoveries / 3) <= 3 * (errors * recoveries / 3 / count) ** 0.5 + 0.03


def test_wrong_lookups_are_of_another_digit_or_another_function() -> None:
    """Of the first hop of 600 questions: half and half, and each of the 9 digits and 5 functions equally often."""
    data = LookupData(errors=1.0, recoveries=0.0)
    digits, functions = [], []
    for i in range(600):
        row = synthetic.make(i, data)
        (right, *_), asked = right_lookups(row.question, row.columns["table"])[0], row.columns["solution"][:2]
        (digits if asked[0] == right[0] else functions).append((right, asked))
    assert abs(len(digits) / 600 - 0.5) < 0.06
    assert all(asked[1] == right[1] and asked[0] != right[0] for right, asked in functions)
    steps = [(int(asked[1]) - int(right[1])) % 10 for right, asked in digits]
    assert abs(np.bincount(steps, minlength=10)[1:] / len(steps) - 1 / 9).max() < 0.06 and 0 not in steps


def test_pieces_mark_what_the_environment_said() -> None:
    pieces = written_episode(QUESTION, TABLE, 1.0, 1.0)
    assert [piece.given for piece in pieces] == [False, True] * (len(pieces) // 2) + [False]
    assert follow(QUESTION, TABLE, "".join(piece.text for piece in pieces)).solved
    assert all(piece.text == observation(TABLE, before.text) for before, piece in itertools.pairwise(pieces) if piece.given)


# ---------------------------------------------------------------- the environment


@pytest.fixture
def environment() -> LookupEnvironment:
    return LookupEnvironment(price=0.05)


def play(environment: LookupEnvironment, texts: list[str]) -> tuple[str, float, bool, int, int]:
    """Transcript, summed reward, end, calls, failed calls; every state goes through JSON."""
    state, transcript, reward, done, calls, failed = environment.start(PROMPT), "", 0.0, False, 0, 0
    for text in texts:
        turn = environment.step(json.loads(json.dumps(state)), text)
        state, done = turn.state, turn.done
        transcript += text + turn.observation
        reward += turn.reward or 0.0
        calls, failed = calls + turn.calls, failed + turn.failed_calls
    return transcript, reward, done, calls, failed


def test_an_episode_by_hand(environment: LookupEnvironment) -> None:
    """Four lookups cost 0.2; one of them is malformed."""
    assert play(environment, ["f3?", "gg?", "g7?", "h2?", "#5"]) == (
        "f3?7;gg?!;g7?2;h2?5;#5", pytest.approx(0.8), True, 4, 1,
    )  # fmt: skip
    assert play(environment, ["f3?", "h2?", "#5"]) == ("f3?7;h2?5;#5", pytest.approx(-0.1), True, 2, 0)
    assert play(environment, ["no idea"]) == ("no idea", 0.0, True, 0, 0)
    assert environment.turn_ends == ("?",) and environment.tools() is None and environment.rewinds


@given(
    texts=st.lists(st.sampled_from(["f3?", "g7?", "h2?", "i0?", "g8?", "zz?", "?"]), max_size=7),
    last=st.sampled_from(["#5", "#", "5", ""]),
)
def test_the_environment_pays_what_the_verifier_says(texts: list[str], last: str) -> None:
    transcript, reward, done, calls, _ = play(LookupEnvironment(price=0.0), [*texts, last])
    assert done and calls == len(texts)
    assert reward == LookupTask(LookupData()).verify(PROMPT, transcript).value


def test_a_guess_is_never_right_and_random_lookups_hardly_ever() -> None:
    """3,000 episodes of 8 random lookups and a random answer on 4 hops: at most 1%."""
    random, solved = np.random.default_rng(0), 0
    data = LookupData()
    rows = [synthetic.make(i, data) for i in range(50)]
    for number in range(3000):
        row = rows[number % 50]
        asked = "".join(
            text + observation(row.columns["table"], text)
            for text in ("fghijk"[random.integers(6)] + str(random.integers(10)) + "?" for _ in range(8))
        )
        solved += follow(row.question, row.columns["table"], f"{asked}#{random.integers(10)}").solved
    assert solved <= 30


def test_the_section_refuses_what_does_not_fit(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r'data.type is "lookup", but the recipe has no environment that answers lookups'):
        recipe(data={"type": "lookup"})
    with pytest.raises(ConfigError, match=r'env.type is "lookup", but data.type is "synthetic" and has no tables to look up'):
        recipe(env={"type": "lookup"})
    with pytest.raises(ConfigError, match=r"env.price is 0.2, and env.max_turns = 5 lookups would cost as much as the answer"):
        recipe(data={"type": "lookup"}, env={"type": "lookup", "price": 0.2, "max_turns": 5})
    env = {"type": "lookup", "price": 0.2, "max_turns": 4}
    assert recipe(data={"type": "lookup"}, env=env, reward={"type": "env"}).env.price == 0.2
    with pytest.raises(ConfigError, match=r'reward.type is "task", but data.type is "lookup"'):
        recipe(data={"type": "lookup"}, env=env)


def test_the_oracle_goes_back_to_the_turn_of_the_first_error() -> None:
    """"f3?7;g8?4;h4?0;#0": g8 is wrong, so the pivot is behind the observation "7;", 5 tokens in."""
    tokenizer = synthetic.tokenizer(synthetic.alphabet(LookupData()))
    tokens = (*tokenizer("f3?7;g8?4;h4?0;#0", add_special_tokens=False).input_ids, tokenizer.eos_token_id)
    node = Node(-1, 0, tokens, (0.0,) * len(tokens), "stop", "#0", Score(0.0), "main", 0)
    tree = Tree(PROMPT, (node,), (main_pivot(1),))
    strategy = OracleStrategy(
        OracleExplore(num_rollouts=2), LookupTask(LookupData()).first_error,
        lambda own: tokenizer.decode(own, skip_special_tokens=True),
    )  # fmt: skip
    (pivot,) = strategy.plan(tree, strategy.initial_state(), Limits(60, 96), np.random.default_rng(0))
    assert pivot.offset == 5
