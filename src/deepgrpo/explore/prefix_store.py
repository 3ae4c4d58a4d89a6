"""Stored successes of `prefix`: bounded per prompt and in all, as plain JSON, with the bisection of each.

    chain of a success   prompt (0), end of segment 1, ..., end of segment m, its answer included
    depth                1 .. m - 1: the prefix ends at the end of that segment
    bisection            all K fail behind `low` (0: the prompt), all succeed behind `high` (m: the whole success);
                         the next prefix is half-way between them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from deepgrpo import rng
from deepgrpo.records import Node, Prompt


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored success, without its last segment.

    Example: Entry(tokens=(5, 6, 7, 8, 9, 4), ends=(2, 4, 6), low=0, high=4, version=12, step=9): four segments, and the next
    prefix has the first two of them.
    """

    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    """Ends of the segments but the last."""
    low: int
    high: int
    version: int
    """Policy version that sampled it."""
    step: int
    """Step in which it was sampled."""

    @classmethod
    def of(cls, node: Node, ends: Sequence[int], step: int) -> Entry | None:
        """Entry of a success with the given segment ends; None if it has one segment only, and so no prefix."""
        if len(ends) < 2:
            return None
        return cls(node.tokens[: ends[-2]], tuple(ends[:-1]), 0, len(ends), node.version, step)

    @property
    def length(self) -> int:
        """Segments of the success, m."""
        return len(self.ends) + 1

    @property
    def depth(self) -> int:
        """Depth of the next prefix."""
        return (self.low + self.high) // 2

    @property
    def prefix(self) -> tuple[int, ...]:
        return self.tokens[: self.ends[self.depth - 1]]


def bisect(low: int, high: int, depth: int, length: int, outcomes: Sequence[bool]) -> tuple[int, int]:
    """Bounds after K continuations from a depth.

    Both outcomes: the bounds stay, because this depth gives a signal. All succeed: nearer to the prompt. None does: deeper.
    Where no depth is left between the bounds, the opposite bound is opened again: the policy has changed since it was set.
    If there is none after that either, the entry is done: even its shortest prefix is mastered, or its longest is hopeless.

    >>> bisect(0, 8, 4, 8, [False, False]), bisect(4, 8, 6, 8, [True, True]), bisect(4, 6, 5, 8, [True, False])
    ((4, 8), (4, 6), (4, 6))
    >>> bisect(4, 6, 5, 8, [True, True]), bisect(4, 6, 5, 8, [False, False])
    ((0, 5), (5, 8))
    >>> bisect(0, 2, 1, 8, [True, True]), bisect(6, 8, 7, 8, [False, False])
    ((0, 1), (7, 8))
    """
    if all(outcomes):
        return (low if depth - low > 1 else 0), depth
    if not any(outcomes):
        return depth, (high if high - depth > 1 else length)
    return low, high


class Store:
    """Entries by prompt, oldest first. Mutable; the strategy's state holds its JSON."""

    def __init__(self, entries: dict[str, list[Entry]]) -> None:
        self._entries = entries

    @classmethod
    def read(cls, state: Mapping[str, Sequence[Mapping[str, Any]]]) -> Store:
        return cls({key: [_entry(each) for each in entries] for key, entries in state.items()})

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        return {key: [_plain(each) for each in entries] for key, entries in self._entries.items()}

    def entries(self) -> list[Entry]:
        return [each for entries in self._entries.values() for each in entries]

    def learn(self, prompt: Prompt, prefix: tuple[int, ...], outcomes: Sequence[bool]) -> list[str]:
        """Move the bisection of the entry that a prefix came from; returns the reason if the entry leaves."""
        entries = self._entries.get(key_of(prompt), [])
        for place, entry in enumerate(entries):
            if entry.tokens[: len(prefix)] == prefix and len(prefix) in entry.ends:
                depth = entry.ends.index(len(prefix)) + 1
                low, high = bisect(entry.low, entry.high, depth, entry.length, outcomes)
                if high - low > 1:
                    entries[place] = replace(entry, low=low, high=high)
                    return []
                self._remove(key_of(prompt), entry)
                return ["mastered" if all(outcomes) else "hopeless"]
        return []  # it left in this step already: the prompt is twice in the batch

    def add(self, prompt: Prompt, entry: Entry, most: int) -> list[str]:
        """Store a success; the oldest of its prompt makes room. Returns what happened."""
        entries = self._entries.setdefault(key_of(prompt), [])
        for place, known in enumerate(entries):
            if (known.tokens, known.ends) == (entry.tokens, entry.ends):  # sampled again: its bisection goes on
                del entries[place]
                entries.append(replace(entry, low=known.low, high=known.high))
                return []
        entries.append(entry)
        crowded = len(entries) - most
        del entries[: max(0, crowded)]
        return ["added", *["crowded"] * crowded]

    def forget(self, step: int, max_age: int | None, most_tokens: int) -> list[str]:
        """Drop entries older than `max_age` steps, and then the oldest until all fit; returns the reasons."""
        reasons: list[str] = []
        total = sum(len(each.tokens) for each in self.entries())
        aged = sorted(
            ((each.step, key, place, each) for key, entries in self._entries.items() for place, each in enumerate(entries)),
            key=lambda item: item[:3],
        )
        for born, key, _, entry in aged:
            old = max_age is not None and step - born > max_age
            if not old and total <= most_tokens:
                break
            self._remove(key, entry)
            total -= len(entry.tokens)
            reasons.append("old" if old else "crowded")
        return reasons

    def _remove(self, key: str, entry: Entry) -> None:
        self._entries[key].remove(entry)
        if not self._entries[key]:
            del self._entries[key]


def entries_of(state: Mapping[str, Sequence[Mapping[str, Any]]], prompt: Prompt) -> list[Entry]:
    """Entries of a prompt, oldest first, from the JSON of a store."""
    return [_entry(each) for each in state.get(key_of(prompt), ())]


def key_of(prompt: Prompt) -> str:
    """Key of a prompt: its id and its tokens, so that a row whose text has changed is another prompt."""
    return f"{rng.key(prompt.id, *prompt.tokens):016x}"


def _entry(raw: Mapping[str, Any]) -> Entry:
    return Entry(**{**raw, "tokens": tuple(raw["tokens"]), "ends": tuple(raw["ends"])})


def _plain(entry: Entry) -> dict[str, Any]:
    return {**asdict(entry), "tokens": list(entry.tokens), "ends": list(entry.ends)}
