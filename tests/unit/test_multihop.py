"""Generated questions of several hops: the world, the questions, the search, the reward."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from deepgrpo.answers.overlap import f1
from deepgrpo.config import MultihopData, MultihopEnv, parse_section
from deepgrpo.envs.multihop import MultihopEnvironment
from deepgrpo.errors import ConfigError, DataError, MissingExtraError
from deepgrpo.prompts.multihop import MultihopTask, build_world, draw_question, rows
from deepgrpo.records import Prompt
from tiny import byte_tokenizer

DATA = MultihopData(people=40, size=60)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def solve(question: str, facts: Any) -> str:
    """The obvious way: peel "the X of" from the question, then follow the facts from the inside out."""
    inner = question.removesuffix("?").partition(" is ")[2]
    relations: list[str] = []
    while (found := re.match(r"the ([a-z ]+?) of (?=the [a-z]|[A-Z])", inner)) and found[1] in (
        "birthplace", "employer", "mother", "founder", "home town", "author", "publisher", "mayor", "oldest company",
    ):  # fmt: skip
        relations.append(found[1])
        inner = inner[found.end() :]
    for relation in reversed(relations):
        inner = facts[inner][relation]
    return inner


def test_f1_by_hand() -> None:
    assert f1("Ada Velden, chemist", "Ada Velden") == pytest.approx(0.8)  # precision 2/3, recall 1
    assert f1("the ADA velden.", "Ada Velden") == 1.0
    assert f1("Ada Ada", "Ada Velden") == pytest.approx(0.5)  # one word of two counts once
    assert f1("", "Ada") == f1("...", "Ada") == f1("Bela", "Ada") == 0.0


def test_every_answer_follows_from_the_documents() -> None:
    world = build_world(0, 40)
    assert Counter(world.kinds.values()) == {"person": 40, "company": 20, "book": 20, "city": 10}
    for row in rows(DATA, Counter()):
        path = row.columns["path"]
        assert solve(row.question, world.facts) == row.answer == path[-1] and 2 <= row.columns["hops"] <= 4
        assert len(set(path)) == len(path) == row.columns["hops"] + 1
        assert row.question.startswith("Who is" if world.kinds[path[-1]] == "person" else "What is")
        # each step is written in the document before it
        assert all(after in world.documents[before] for before, after in itertools.pairwise(path))
        assert all(other not in row.question for other in path[1:])


def test_worlds_and_splits() -> None:
    def questions(**fields: Any) -> list[str]:
        return [row.question for row in rows(MultihopData(**{"people": 40, "size": 60} | fields), Counter())]

    assert questions() == questions() and len(set(questions())) == 60
    assert questions(seed=1) != questions() and not set(questions()) & set(questions(split="test"))
    assert questions(limit=5) == questions()[:5]
    hops = Counter(row.columns["hops"] for row in rows(MultihopData(size=600), Counter()))
    assert set(hops) == {2, 3, 4} and min(hops.values()) > 150
    assert len(build_world(0, 360).kinds) == 360 + 180 + 180 + 90
    with pytest.raises(ConfigError, match=r"data.size .* is 500, but a world of data.people = 8 has only .* lower the size"):
        questions(people=8, size=500, max_hops=2)
    with pytest.raises(ConfigError, match=r"data.min_hops is 5, but data.max_hops is 4"):
        parse_section(MultihopData, {"min_hops": 5}, "data")


def test_a_walk_that_comes_back_is_no_question() -> None:
    world, random = build_world(0, 8), np.random.default_rng(0)
    drawn = [draw_question(world, 4, random) for _ in range(200)]
    assert None in drawn and all(each is None or len(set(each[1])) == 5 for each in drawn)


@pytest.fixture(scope="module")
def environment() -> MultihopEnvironment:
    return MultihopEnvironment.build(MultihopEnv(results=2), byte_tokenizer())


def test_an_episode_finds_the_answer_with_the_tools(environment: MultihopEnvironment) -> None:
    """A search for a name finds its document, and reading along the path ends at the answer."""
    row = rows(DATA, Counter())[0]
    prompt = Prompt(row.id, row.question, (1,), row.question, row.answer, row.columns)
    state, world = environment.start(prompt), build_world(0, 40)
    for title in row.columns["path"][:-1]:
        turn = environment.step(state, call("search", query=title))
        assert turn.observation.splitlines()[0].startswith(f"{title}: {title} is a ") and turn.observation.count("\n") < 2
        turn = environment.step(turn.state, call("read", title=title))
        assert (turn.observation, turn.failed_calls, turn.done) == (world.documents[title], 0, False)
        state = turn.state
    assert state["calls"] == 2 * row.columns["hops"]
    end = environment.step(state, f"I know it. Answer: {row.answer}.")
    assert (end.done, end.reward) == (True, 1.0)
    assert environment.step(state, f"Answer: no. Answer: {row.answer} Jr").reward == pytest.approx(0.8)
    task = MultihopTask(DATA)
    assert task.verify(prompt, "Answer: nobody").value == 0.0 and task.verify(prompt, row.answer or "").value == 1.0
    assert not task.verify(prompt, "nobody").parsed and task.vote(prompt, "Answer: x ") == "x"


def test_what_the_tools_answer_otherwise(environment: MultihopEnvironment) -> None:
    row = rows(DATA, Counter())[0]
    state = environment.start(Prompt("p", "q", (1,), "q", row.answer, row.columns))
    name = next(iter(build_world(0, 40).documents))
    said = [
        environment.step(state, text).observation
        for text in (
            call("search", query="zzz"), call("search", query=""), call("search"), call("read", title=name[:-1]),
            call("read", title="\x1b[2J"), call("open", title=name), call("search", query=f"{name} " * 1000),
        )
    ]  # fmt: skip
    assert said[:2] == ["no document has these words"] * 2
    assert said[2] == "error: search: query: Missing required argument"
    assert said[3] == f"error: read raised LookupError: no document {name[:-1]!r}; did you mean {name!r}?"
    assert said[4] == "error: read raised LookupError: no document '\\x1b[2J'"
    assert said[5] == "error: there is no tool 'open'; the tools are search, read" and said[6].startswith(f"{name}: ")
    assert [each["function"]["name"] for each in environment.tools()] == ["search", "read"]


def test_the_sections_refuse_what_does_not_fit(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r'env.type is "multihop", but data.type is "synthetic" and has no documents'):
        recipe(env={"type": "multihop"})
    with pytest.raises(DataError, match=r'has no world to search; set data.type = "multihop"'):
        MultihopEnvironment.build(MultihopEnv(), byte_tokenizer()).start(Prompt("p", "q", (1,), "q", "a"))
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingExtraError, match=r"deepgrpo\[search\]"):
        MultihopEnvironment.build(MultihopEnv(), byte_tokenizer())
