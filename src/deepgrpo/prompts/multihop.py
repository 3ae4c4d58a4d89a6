"""Generated worlds for questions of several hops: people, companies, books and cities, one document each.

    document   Marta Velden: Marta Velden is a chemist. She was born in Ostrafell. She works for Tamsin Instruments.
    question   Who is the mayor of the birthplace of the author of The Glass Orchard?     3 hops: author, birthplace, mayor
    answer     Ilse Brandt

Everything follows from the seed of a world and its size: no text is shipped. Names share their parts, so a search also finds
documents that do not help.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from deepgrpo import rng
from deepgrpo.answers.overlap import f1
from deepgrpo.config import MultihopData
from deepgrpo.errors import ConfigError
from deepgrpo.feedback import Score
from deepgrpo.prompts.rows import QuestionRow
from deepgrpo.records import Prompt

WORLD = "world"
"""Column of a row with the seed and the size of its world."""
MARK = "Answer:"
"""The answer of a response is the text behind its last occurrence, else the whole last turn."""

_TEST_SHARE = 8  # one question in 8 belongs to the test split

_FIRST = [
    "Ada", "Bela", "Cleo", "Dario", "Edda", "Farid", "Greta", "Hugo", "Ilse", "Jonas", "Kira", "Lars", "Marta",
    "Nils", "Olga", "Pavel", "Rosa", "Sven", "Tamsin", "Uma",
]  # fmt: skip
_LAST = [
    "Abel", "Brandt", "Castor", "Dorn", "Ekman", "Falk", "Grieg", "Holt", "Ivers", "Jansen", "Keller", "Lund",
    "Moreau", "Novak", "Ostrow", "Petri", "Quist", "Velden",
]  # fmt: skip
_CITY = [
    "Ostra", "Brim", "Cal", "Dun", "Elder", "Fen", "Gar", "Hollow", "Ister", "Kess", "Lor", "Mar", "Nor", "Quell",
    "Rook", "Silver", "Tarn", "Wex",
]  # fmt: skip
_PLACE = ["fell", "ford", "haven", "mouth", "port", "stead", "ton", "vale", "wick", "bridge"]
_ADJECTIVE = [
    "Amber", "Broken", "Crimson", "Distant", "Empty", "Frozen", "Glass", "Hidden", "Iron", "Last", "Midnight",
    "Quiet", "Silver", "Winter",
]  # fmt: skip
_NOUN = [
    "Anchor", "Bridge", "Cathedral", "Orchard", "Garden", "Harbour", "Island", "Lantern", "Mirror", "Meadow",
    "Orchestra", "River", "Sparrow", "Window",
]  # fmt: skip
_TRADE = [
    "Foundry", "Instruments", "Optics", "Press", "Shipping", "Systems", "Textiles", "Works", "Brewing", "Motors",
]  # fmt: skip
_WORK = ["chemist", "sailor", "painter", "teacher", "baker", "violinist", "surgeon", "farmer", "pilot", "judge"]

Relation = tuple[str, str, str]
"""Name in a question, kind of what it leads to, sentence of a document."""

_RELATIONS: Mapping[str, tuple[Relation, ...]] = {
    "person": (
        ("birthplace", "city", "{name} was born in {value}."),
        ("employer", "company", "{name} works for {value}."),
        ("mother", "person", "The mother of {name} is {value}."),
    ),
    "company": (
        ("founder", "person", "{value} founded {name}."),
        ("home town", "city", "{name} has its head office in {value}."),
    ),
    "book": (
        ("author", "person", "{value} wrote {name}."),
        ("publisher", "company", "{name} was published by {value}."),
    ),
    "city": (
        ("mayor", "person", "{value} is the mayor of {name}."),
        ("oldest company", "company", "{value} is the oldest company in {name}."),
    ),
}


@dataclass(frozen=True)
class World:
    """Facts of a world. Example: kinds["Ada Falk"] == "person", facts["Ada Falk"]["birthplace"] == "Calford"."""

    kinds: Mapping[str, str]
    facts: Mapping[str, Mapping[str, str]]
    documents: Mapping[str, str]
    """Title → text."""


@cache
def build_world(seed: int, people: int) -> World:
    """Build a world: `people`, half as many companies and books, and a quarter as many cities."""
    random = rng.generator("multihop world", seed, people)
    names = {
        "person": _drawn(random, people, _FIRST, " ", _LAST),
        "company": _drawn(random, people // 2, _LAST, " ", _TRADE),
        "book": _drawn(random, people // 2, [f"The {each}" for each in _ADJECTIVE], " ", _NOUN),
        "city": _drawn(random, people // 4, _CITY, "", _PLACE),
    }
    kinds = {name: kind for kind, own in names.items() for name in own}
    facts: dict[str, dict[str, str]] = {}
    documents: dict[str, str] = {}
    for name, kind in kinds.items():
        first = f"{name} is a {_WORK[int(random.integers(len(_WORK)))]}." if kind == "person" else f"{name} is a {kind}."
        sentences = [first]
        facts[name] = {}
        for relation, leads_to, sentence in _RELATIONS[kind]:
            others = [each for each in names[leads_to] if each != name]
            value = others[int(random.integers(len(others)))]
            facts[name][relation] = value
            sentences.append(sentence.format(name=name, value=value))
        documents[name] = " ".join(sentences)
    return World(kinds, facts, documents)


def _drawn(random: np.random.Generator, count: int, left: Sequence[str], between: str, right: Sequence[str]) -> list[str]:
    every = [f"{a}{between}{b}" for a, b in itertools.product(left, right)]
    return [every[i] for i in random.permutation(len(every))[:count]]


def draw_question(world: World, hops: int, random: np.random.Generator) -> tuple[str, list[str]] | None:
    """Draw a question and its path of names, whose last one is the answer; None if the walk came back to an earlier name."""
    path = [list(world.kinds)[int(random.integers(len(world.kinds)))]]
    asked = path[0]
    for _ in range(hops):
        facts = world.facts[path[-1]]
        relation = list(facts)[int(random.integers(len(facts)))]
        path.append(facts[relation])
        asked = f"the {relation} of {asked}"
    if len(set(path)) < len(path):
        return None
    word = "Who" if world.kinds[path[-1]] == "person" else "What"
    return f"{word} is {asked}?", path


def is_test(question: str) -> bool:
    """True for a question of the test split; depends on its text only."""
    return rng.key("multihop split", question) % _TEST_SHARE == 0


def rows(data: MultihopData, skipped: Counter[str]) -> list[QuestionRow]:
    """Generate the questions of a split, distinct; no row is skipped. Raises ConfigError if the world has too few."""
    size = min(data.size, data.limit or data.size)
    world = build_world(data.seed, data.people)
    random = rng.generator("multihop questions", data.seed, data.split, data.min_hops, data.max_hops)
    found: dict[str, QuestionRow] = {}
    for _ in range(20 * size + 10_000):
        drawn = draw_question(world, int(random.integers(data.min_hops, data.max_hops + 1)), random)
        if drawn is None or is_test(drawn[0]) != (data.split == "test") or drawn[0] in found:
            continue
        question, path = drawn
        columns = {
            "question": question, "answer": path[-1], "hops": len(path) - 1, "path": path,
            WORLD: {"seed": data.seed, "people": data.people},
        }  # fmt: skip
        found[question] = QuestionRow(f"multihop-{data.split}-{len(found)}", question, path[-1], columns)
        if len(found) == size:
            return list(found.values())
    raise ConfigError(
        f"data.size (or data.limit) is {size}, but a world of data.people = {data.people} has only {len(found)} questions of "
        f"{data.min_hops} to {data.max_hops} hops in the split {data.split!r}; lower the size or raise data.people"
    )


def read_answer(text: str) -> str:
    """The answer in the last turn of a response."""
    return text.rpartition(MARK)[2].strip()


class MultihopTask:
    """Verifier: F1 of the answer's words."""

    def __init__(self, data: MultihopData) -> None:
        """Keep nothing: a prompt has its answer."""

    def verify(self, prompt: Prompt, completion: str) -> Score:
        """F1 of the answer and the reference; `parsed` is False without "Answer:"."""
        return Score(f1(read_answer(completion), str(prompt.answer)), parsed=MARK in completion)

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """The answer."""
        return read_answer(completion) or None


def world_of(column: Mapping[str, Any]) -> World:
    """The world of a row, by its column."""
    return build_world(int(column["seed"]), int(column["people"]))
