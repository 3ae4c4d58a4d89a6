"""A user's own strategy: loaded from a file, its class checked before training, each return value checked at the call.

`explore = { type = "user", strategy = "mine.py:Mine" }`. The class is built by `Mine.build(config, context)` and has the
methods of `Strategy` (base.py); docs/algorithms/your_own.md has an example. A state is passed on as a checkpoint would give it
back, so a resumed run goes on as an uninterrupted one.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from deepgrpo.config import UserExplore
from deepgrpo.config.base import GIVEN
from deepgrpo.errors import ConfigError, DeepGRPOError, StrategyError
from deepgrpo.explore.base import Context, Limits, Signal, State
from deepgrpo.explore.checks import BrokenRuleError, check_credit, check_metrics, check_pivots, check_state
from deepgrpo.loading import load_object, show
from deepgrpo.records import Credit, Pivot, Tree

KEY = "explore.strategy"
PARAMETERS = {
    "build": ("config", "context"),
    "initial_state": (),
    "plan": ("tree", "state", "limits", "random"),
    "returns": ("level",),
    "credit": ("tree",),
    "observe": ("state", "trees"),
    "report": ("state",),
}
"""Method → its parameters, passed by position."""

T = TypeVar("T")


@dataclass(frozen=True)
class UserStrategy:
    config: UserExplore
    inner: Any
    """The user's strategy."""
    signals: frozenset[Signal]

    @classmethod
    def build(cls, config: UserExplore, context: Context) -> UserStrategy:
        """Load and build it.

        Raises ConfigError: file or name is missing, it is no class, a method is missing or has other parameters.
        Raises StrategyError: `build` or `initial_state` raises or breaks the contract.
        """
        found = load_object(config.strategy, KEY) if config.held is None else config.held
        if config.held is None or isinstance(found, type):
            check_class(found, config.strategy)
            inner = _call(config, "build", lambda: found.build(config, context))
        else:
            check_class(type(found), config.strategy, built=True)
            inner = found
        if inner is None:
            raise StrategyError(f"{_head(config)}: build returned None; return an instance, e.g. `return cls(config)`")
        for name in (name for name in PARAMETERS if name != "build"):
            if not callable(getattr(inner, name, None)):
                raise StrategyError(f"{_head(config)}: build returned {show(inner)}, without {name}; return an instance")
        signals = _call(config, "signals", lambda: inner.signals)
        if not isinstance(signals, frozenset | set) or not all(isinstance(each, Signal) for each in signals):
            raise StrategyError(f"{_head(config)}: signals is {show(signals)}; make it a frozenset of Signal, empty for none")
        strategy = cls(config, inner, frozenset(signals))
        strategy.initial_state()
        return strategy

    def initial_state(self) -> State:
        return self._checked("initial_state", self.inner.initial_state, lambda state: check_state(state, "initial_state"))

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        return self._checked(
            "plan", lambda: self.inner.plan(tree, state, limits, random),
            lambda answer: self._within_budget(tree, check_pivots(answer, tree, limits), limits),
        )  # fmt: skip

    def _within_budget(self, tree: Tree, pivots: list[Pivot], limits: Limits) -> list[Pivot]:
        config = self.config
        most = config.num_rollouts * (1 + config.most_branches)
        planned = sum(pivot.num_branches for pivot in (*tree.pivots, *pivots) if pivot.max_tokens is None)
        if planned > most:
            raise BrokenRuleError(
                f"plan has {planned} continuations for prompt {tree.prompt.id!r}, but explore.num_rollouts · (1 + "
                f"explore.most_branches) is {config.num_rollouts} · (1 + {config.most_branches}) = {most}; raise one of the "
                "two, or plan fewer"
            )
        # a response has at most so many segments of one token; more would never end
        segments = sum(pivot.num_branches for pivot in (*tree.pivots, *pivots) if pivot.max_tokens is not None)
        if segments > most * limits.max_new_tokens:
            raise BrokenRuleError(
                f"plan has {segments} segments for prompt {tree.prompt.id!r}, more than {most} responses of "
                f"sampling.max_new_tokens = {limits.max_new_tokens} can have; return an empty list once the tree is complete"
            )
        return pivots

    def returns(self, level: int) -> bool:
        answer = _call(self.config, "returns", lambda: self.inner.returns(level))
        if not isinstance(answer, bool | np.bool_):
            raise StrategyError(f"{_head(self.config)}: returns returned {show(answer)}; return True or False")
        return bool(answer)

    def credit(self, tree: Tree) -> Credit:
        return self._checked("credit", lambda: self.inner.credit(tree), lambda answer: check_credit(answer, tree))

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        return self._checked(
            "observe", lambda: self.inner.observe(state, trees), lambda answer: check_state(answer, "observe")
        )

    def report(self, state: State) -> dict[str, float]:
        return self._checked("report", lambda: self.inner.report(state), check_metrics)

    def _checked(self, name: str, call: Callable[[], Any], check: Callable[[Any], T]) -> T:
        answer = _call(self.config, name, call)
        try:
            return check(answer)
        except BrokenRuleError as error:
            raise StrategyError(f"{_head(self.config)}: {error}") from None


def check_class(found: Any, reference: str, *, built: bool = False) -> None:
    """Raises ConfigError unless it is a class with all methods of a strategy, each callable with their arguments.

    Args:
        built: there is an instance already, so `build` is not needed.
    """
    if not isinstance(found, type):
        raise ConfigError(f"{KEY} is {reference!r}, which is {show(found)} and no class; name a class")
    if not hasattr(found, "signals"):
        raise ConfigError(f"{KEY} is {reference!r}, which has no signals; add `signals = frozenset()`, or inherit Stateless")
    for name, parameters in PARAMETERS.items():
        if built and name == "build":
            continue
        method = inspect.getattr_static(found, name, None)
        wanted = ", ".join(["cls" if name == "build" else "self", *parameters])
        if method is None:
            raise ConfigError(f"{KEY} is {reference!r}, which has no method {name}; add `def {name}({wanted})`")
        if name == "build" and not isinstance(method, classmethod | staticmethod):
            raise ConfigError(f"{KEY} is {reference!r}, whose build is no class method; put @classmethod above it")
        try:
            signature = inspect.signature(getattr(found, name))
        except (TypeError, ValueError):
            raise ConfigError(f"{KEY} is {reference!r}, whose {name} cannot be called; write `def {name}({wanted})`") from None
        bound = isinstance(method, classmethod | staticmethod)
        try:
            signature.bind(*([None] * (len(parameters) + (not bound))))
        except TypeError:
            raise ConfigError(
                f"{KEY} is {reference!r}, whose method {name}{signature} does not take ({', '.join(parameters)}); write "
                f"`def {name}({wanted})`"
            ) from None


def _call(config: UserExplore, name: str, call: Callable[[], T]) -> T:
    """Call the user's code; an error becomes a sentence with its place, and keeps its traceback (DEEPGRPO_DEBUG=1)."""
    try:
        return call()
    except DeepGRPOError:
        raise
    except (Exception, SystemExit) as error:
        raise StrategyError(
            f"{_head(config)}: {name} raised {type(error).__name__}: {error} ({_place(error)}); correct it (DEEPGRPO_DEBUG=1 "
            "shows the whole traceback)"
        ) from error


def _place(error: BaseException) -> str:
    """File and line of the user's code that raised: the deepest frame in the file that we called."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else "at the call"


def _head(config: UserExplore) -> str:
    return f"the strategy {config.strategy.removeprefix(GIVEN)!r}"
