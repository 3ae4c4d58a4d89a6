"""The `Strategy` interface, and the context a strategy is built from.

A strategy decides where to sample next (`plan`, called by explore/grow.py), how each token is credited (`credit`, called by
the trainer), and what to learn from a step (`observe`). No other stage knows a strategy's name.

To add a strategy to the package:

1. a frozen class with `build` and the methods of `Strategy`, in a file of explore/; one that only chooses pivots otherwise
   derives from `PivotStrategy` (pivots.py) and has a `log_q`, like random.py
2. config/explore.py: a section that names the class in `implementation`, like `RandomExplore`, listed in `ExploreConfig` (from
   which the contract suite takes it, too) and exported by config/__init__.py
3. a page in docs/algorithms/, named in zensical.toml

A user's own needs none of this (explore/user.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np

from deepgrpo.config.strategy import Explore
from deepgrpo.credit.group import Scale
from deepgrpo.engines.base import SampleStats
from deepgrpo.explore.segments import Segmenter
from deepgrpo.records import ROOT, Credit, Pivot, Tree

State = Mapping[str, Any]
"""A strategy's memory between steps: plain JSON, saved in checkpoints."""

ATTENTION = "attention"
"""Signal: the attention that later steps pay to a token's step (model/signals.py)."""

BELIEF = "belief"
"""Signal: the probability of the reference answer at the start of a token's step (train/belief.py)."""

LOCATED = "located"
"""Signal: 1 for the tokens of the step that the policy itself names as the first wrong one (train/critique.py), else 0; all
tokens are 0 if it finds no wrong step, UNREAD if its answer names none, UNASKED if the context has no room for the question."""
UNREAD, UNASKED = -1.0, -2.0


@dataclass(frozen=True, slots=True)
class Context:
    """Arguments of a strategy's `build` besides its config section."""

    scale: Scale = "none"
    """Scale of the advantages (`credit.scale`)."""
    tokenizer: Any = None
    """The policy's tokenizer; `tokenizer.decode([token])` is the text of a token."""
    task: Any = None
    """The task of the data section (prompts/tasks.py); the oracle asks it for first errors."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Length limits of a response."""

    max_new_tokens: int
    """Longest response along a path, in tokens."""
    max_total_tokens: int
    """Longest prompt plus response along a path, in tokens."""

    def response(self, tree: Tree) -> int:
        """Longest response to this prompt, in tokens; at most 0 if the prompt leaves no room."""
        return min(self.max_new_tokens, self.max_total_tokens - len(tree.prompt.tokens))


@dataclass(frozen=True, slots=True)
class Signal:
    """A per-token measurement of sampled tokens by the policy, beyond their log-probs.

    Example: Signal(ATTENTION, segment=step_ends, lag=4): attention paid to a step by the steps from the fourth after it on.
    """

    name: str
    """Kind of signal; the key in `Node.signals`."""
    segment: Segmenter
    """Cuts the tokens of a response into the steps that are measured."""
    lag: int = 0
    """For attention: steps nearer than this are ignored."""
    cue: str = ""
    """For belief: text written between a state and the reference answer, e.g. "\n#### "."""
    closing: str = ""
    """For belief: text behind the answer that belongs to it, so that 1 is not the beginning of 12, e.g. "}"."""
    most_reward: float = math.inf
    """Only nodes whose outcome (`Node.outcome`) is at most this are measured."""
    unsolved: bool = False
    """Only nodes of trees without an outcome above `most_reward` in the main stream are measured."""


@dataclass(frozen=True, slots=True)
class Critique(Signal):
    """The signal LOCATED: a question to the policy about its own rollout."""

    question: str = ""
    """Wording, with {question}, {steps}, {count} and {answer}."""
    step: str = ""
    """Wording of a step in {steps}, with {number} and {text}."""
    answer_tokens: int = 32
    """Longest answer."""
    temperature: float = 0.0
    """0: greedy."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Values of a signal, and what they cost."""

    values: list[np.ndarray]
    """For each node `[n]` floats, one per own token."""
    forwarded: int
    """Tokens forwarded for nothing else."""
    sampled: SampleStats = field(default_factory=SampleStats)
    """Tokens sampled for nothing else."""
    sequences: int = 0
    """Texts sampled for nothing else."""


Signals = Callable[[Signal, Sequence[tuple[Tree, int]], Sequence[int]], Measured]
"""(signal, (tree, node) pairs, a random key for each) → values."""


class Strategy(Protocol):
    """Rule of exploration. Frozen: the only thing that changes is the state, a value passed in and returned.

    The class has a constructor `build(cls, config, context) -> Strategy`, which gets its section and a `Context`.
    """

    @property
    def signals(self) -> frozenset[Signal]:
        """Signals that `plan` reads from `Node.signals`, for nodes of rounds that `returns`; empty: none."""

    def initial_state(self) -> State:
        """The state before the first step."""

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        """Pivots to sample from next; empty: the tree is complete. Called again after each round of sampling."""

    def returns(self, level: int) -> bool:
        """True if later rounds may branch off nodes of this round (0: the first), so that the engine keeps its cache."""

    def credit(self, tree: Tree) -> Credit:
        """Advantage and stream of every token to train."""

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        """The next state, from a step's trees in prompt order."""

    def report(self, state: State) -> dict[str, float]:
        """Metrics of the state."""


class Stateless:
    """Base for strategies that learn nothing between steps and need no signals."""

    signals: frozenset[Signal] = frozenset()

    def initial_state(self) -> State:
        return {}

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        return state

    def report(self, state: State) -> dict[str, float]:
        return {}


Keys = TypeVar("Keys", bound=Explore)


@dataclass(frozen=True)
class Scaled(Generic[Keys]):
    """Base for strategies that are made of their section and the scale of their advantages."""

    config: Keys
    scale: Scale = "none"

    @classmethod
    def build(cls, config: Keys, context: Context) -> Self:
        return cls(config, context.scale)


def main_pivot(num_rollouts: int) -> Pivot:
    """First pivot of a tree: G rollouts from the prompt, the main stream."""
    return Pivot(parent=ROOT, offset=0, num_branches=num_rollouts, stream="main")
