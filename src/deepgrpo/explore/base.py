"""A strategy says where to sample next, what each token is worth, and what it learned from the step.

The three questions are asked by `grow`, by the trainer, and at the end of a step. Nobody else ever learns a strategy's
name; a new method is a new file with these methods, and an entry in `explore/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from deepgrpo.explore.segments import Segmenter
from deepgrpo.records import ROOT, Credit, Pivot, Tree

State = Mapping[str, Any]
"""What a strategy remembers between steps: plain JSON, so that a checkpoint can hold it."""

ATTENTION = "attention"
"""How much of the later steps' attention goes to a token's step (model/signals.py)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a response may get."""

    max_new_tokens: int
    """Longest response along a path."""
    max_total_tokens: int
    """Longest prompt plus response along a path."""

    def response(self, tree: Tree) -> int:
        """Longest response to this prompt, in tokens; at most 0 if the prompt leaves no room."""
        return min(self.max_new_tokens, self.max_total_tokens - len(tree.prompt.tokens))


@dataclass(frozen=True, slots=True)
class Signal:
    """Something that the policy has to be asked about sampled tokens, beyond their log-probs.

    Example: Signal(ATTENTION, segment=step_ends, lag=4): how much the steps from the fourth after it on attend to a step.
    """

    name: str
    """Which signal; the key in `Node.signals`."""
    segment: Segmenter
    """How the tokens of a response are cut into the steps that the signal is about."""
    lag: int = 0
    """Steps nearer than this do not count."""


Signals = Callable[[Signal, Sequence[tuple[Tree, int]]], tuple[list[np.ndarray], int]]
"""(signal, (tree, node) pairs) → for each pair `[n]` floats, one per own token of the node; and the tokens forwarded."""


class Strategy(Protocol):
    """Where to explore. Frozen: what changes is the state, a value that is passed in and handed back."""

    @property
    def signals(self) -> frozenset[Signal]:
        """What `plan` wants to find in `Node.signals`, of all nodes of a round that `returns`; empty: nothing."""
        ...

    def initial_state(self) -> State: ...

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        """Where to sample next in this tree; empty: it is grown. Called again after each round of sampling."""
        ...

    def returns(self, level: int) -> bool:
        """Whether later rounds may branch off what is sampled in this one (0: the first), so that it is worth keeping."""
        ...

    def credit(self, tree: Tree) -> Credit:
        """Advantage and stream of every token that is to be trained."""
        ...

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        """What was learned from a step's trees, in prompt order."""
        ...

    def report(self, state: State) -> dict[str, float]:
        """Figures of the state, for the metrics."""
        ...


def main_pivot(num_rollouts: int) -> Pivot:
    """The first pivot of every tree: G rollouts from the prompt, the main stream."""
    return Pivot(parent=ROOT, offset=0, num_branches=num_rollouts, stream="main")
