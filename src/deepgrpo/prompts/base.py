"""A source of prompts, and the cursor that marks a place in it.

    LoadedSource     all rows in memory                       (loaded.py)
    EndlessSource    generated without end                    (loaded.py)
    StreamedSource   rows read when they are needed           (streamed.py)
    MixedSource      several of these, mixed by weight        (mixed.py)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepgrpo.records import Prompt

SOME = 256
"""Prompts that are looked at before the first step, of a source that is not in memory."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Position of the next prompt. Example: Cursor(epoch=2, position=64) comes after 64 rows of the third pass."""

    epoch: int = 0
    position: int = 0
    skipped: int = 0
    """Rows left out so far, of a streamed source; the others leave them out at the start."""
    place: Mapping[str, Any] | None = None
    """Plain JSON: where to go on reading a stream that has no addresses."""
    taken: int = 0
    """Prompts taken so far, in a cursor of a mix's source."""
    sources: tuple[Cursor, ...] = ()
    """Cursors of a mix's sources, in their order; `position` then counts the prompts of all."""

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"epoch": self.epoch, "position": self.position}
        found |= {name: value for name in ("skipped", "place", "taken") if (value := getattr(self, name))}
        return found | ({"sources": [each.to_dict() for each in self.sources]} if self.sources else {})

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Cursor:
        return cls(
            int(state["epoch"]), int(state["position"]), int(state.get("skipped", 0)), state.get("place"),
            int(state.get("taken", 0)), tuple(cls.from_dict(each) for each in state.get("sources", ())),
        )  # fmt: skip


class PromptSource(ABC):
    """Prompts in a reproducible order; created by `source.build_source`."""

    digest: str
    """Digest of the prompts, for the fingerprint (fingerprint.py)."""
    order_seed: int | None
    """Seed of the order; None if the order does not depend on one."""
    skipped: Mapping[str, int]
    """Rows left out at the start, by reason."""

    @property
    @abstractmethod
    def size(self) -> int | None:
        """Number of prompts; of a streamed source that of its rows; None if it is endless or not known."""

    @property
    def described(self) -> str:
        """The size in words."""
        return "endless prompts" if self.size is None else f"{self.size} prompts"

    def __len__(self) -> int:
        if self.size is None:
            raise TypeError("an endless source has no length; use `size`, which is None")
        return self.size

    def __bool__(self) -> bool:
        return True  # no source is empty, and an endless one has no length

    @abstractmethod
    def take(self, cursor: Cursor, num_prompts: int) -> tuple[tuple[Prompt, ...], Cursor]:
        """The next prompts and the cursor after them: a pure function of the cursor.

        A finite source continues with the next epoch, in a new order; an endless one only counts positions.
        """

    @abstractmethod
    def head(self, num_prompts: int) -> tuple[Prompt, ...]:
        """The first prompts in data order, at most all, for evaluation."""

    def known(self) -> tuple[Prompt, ...]:
        """All prompts of a source that is in memory, else some of the first."""
        return self.head(SOME)

    def metrics(self, cursor: Cursor) -> dict[str, float]:
        """Metrics of the place in the data, such as passes (`data/epochs`) and rows left out; empty for endless data."""
        return {}
