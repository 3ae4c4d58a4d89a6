"""The environment of generated questions of several hops (prompts/multihop.py): two tools over the documents of their world.

    search("The Glass Orchard") ─► titles and first sentences, by BM25      read("Ada Falk") ─► the document
    "... Answer: Ilse Brandt" ─► reward: F1 of the answer's words

A state is {"calls", "world", "answer"}; the documents follow from the world's seed.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from deepgrpo.answers.overlap import f1
from deepgrpo.config import MultihopEnv
from deepgrpo.envs.base import State, Turn
from deepgrpo.envs.calling import CallingEnvironment
from deepgrpo.envs.calls import Call
from deepgrpo.envs.toolbox import Result, result_of, schema_of, typed, unknown
from deepgrpo.errors import DataError, requires_extra
from deepgrpo.prompts.multihop import WORLD, World, read_answer, world_of
from deepgrpo.records import Prompt

_QUERY = 500
"""Characters of a query that are searched for."""
_LONGEST = 4000
"""Characters of a result."""


class MultihopEnvironment(CallingEnvironment):
    def __init__(self, config: MultihopEnv, tokenizer: Any) -> None:
        """Raises MissingExtraError without bm25s."""
        with requires_extra("bm25s", "search", 'env.type = "multihop"'):
            import bm25s  # noqa: F401
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index that it builds
        self._found = config.results
        super().__init__(tokenizer, [schema_of(name, each) for name, each in _tools(None, 1).items()], config.max_calls)

    @classmethod
    def build(cls, config: MultihopEnv, tokenizer: Any) -> MultihopEnvironment:
        return cls(config, tokenizer)

    def start(self, prompt: Prompt) -> State:
        """Raises DataError if the prompt has no world."""
        world = prompt.columns.get(WORLD)
        if not isinstance(world, dict) or prompt.answer is None:
            raise DataError(f'prompt {prompt.id!r} has no world to search; set data.type = "multihop"')
        return {"calls": 0, "world": world, "answer": prompt.answer}

    def results(self, calls: Sequence[tuple[State, Call]]) -> list[Result]:
        return [self._result(state, call) for state, call in calls]

    def last(self, state: State, text: str) -> Turn:
        return Turn(state, reward=f1(read_answer(text), state["answer"]), done=True)

    def _result(self, state: State, call: Call) -> Result:
        tools = _typed_tools(state["world"]["seed"], state["world"]["people"], self._found)
        if call.name not in tools:
            return unknown(call, list(tools))
        return result_of(tools[call.name], call.name, call.arguments, _LONGEST)


def _tools(index: Index | None, count: int) -> dict[str, Callable[..., Any]]:
    """The tools, by name. The model sees their docstrings."""

    def search(query: str) -> str:
        """Search the documents by words. Returns the titles and first sentences of the best ones.

        Args:
            query: The words to look for, best a name.
        """
        assert index is not None
        return index.search(query, count)

    def read(title: str) -> str:
        """Read a document.

        Args:
            title: The title, as a search returns it.
        """
        assert index is not None
        return index.read(title)

    return {"search": search, "read": read}


class Index:
    """The documents of a world, with their BM25 index."""

    def __init__(self, world: World) -> None:
        import bm25s

        self._documents = world.documents
        self._titles = list(world.documents)
        self._tokenize: Callable[..., Any] = bm25s.tokenize
        self._bm25 = bm25s.BM25()
        self._bm25.index(self._words([*world.documents.values()]), show_progress=False)

    def search(self, query: str, count: int) -> str:
        """The best documents, each on a line with its title and first sentence."""
        (words,) = self._words([query[:_QUERY]])
        known = [word for word in words if word in self._bm25.vocab_dict]
        if not known:
            return "no document has these words"
        found, scores = self._bm25.retrieve(
            [known], k=min(count, len(self._titles)), show_progress=False, backend_selection="numpy"
        )
        lines = [self._line(self._titles[int(i)]) for i, score in zip(found[0], scores[0], strict=True) if score > 0]
        return "\n".join(lines)

    def read(self, title: str) -> str:
        """The text of a document. Raises LookupError for another title, with those that come close."""
        if title in self._documents:
            return self._documents[title]
        close = difflib.get_close_matches(title[:80], self._titles, n=1)
        raise LookupError(f"no document {title[:80]!r}" + (f"; did you mean {close[0]!r}?" if close else ""))

    def _words(self, texts: list[str]) -> list[list[str]]:
        found: list[list[str]] = self._tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
        return found

    def _line(self, title: str) -> str:
        return f"{title}: {self._documents[title].partition('. ')[0]}."


@cache
def _typed_tools(seed: int, people: int, count: int) -> dict[str, Callable[..., Any]]:
    index = Index(world_of({"seed": seed, "people": people}))
    return {name: typed(tool) for name, tool in _tools(index, count).items()}
