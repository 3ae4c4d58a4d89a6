"""The environment protocol: a value in and a value out, so that any turn of an episode can be gone back to.

    start(prompt) ─► state ─► step(state, "f3?") ─► Turn(state', observation "7", reward, done) ─► step(state', ...) ─► ...

A state is plain JSON and is never changed: `step` makes the next one. Branches at a pivot call `step` with the state that is
stored there, several times and in any order. An environment whose state lives elsewhere, such as a server, sets `rewinds`
to False: its states name live instances, and growth replays the recorded turns in a fresh instance instead
(explore/episodes.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from deepgrpo.records import Prompt

State = Any
"""A JSON value: None, bool, number, string, or lists and dicts with string keys of them."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Answer of an environment to one turn of the model.

    Example: Turn(state={"seen": [3]}, observation="7", reward=-0.05, calls=1).
    """

    state: State
    """The state after the turn."""
    observation: str = ""
    """Text that the model reads next; not shown if `done`."""
    reward: float | None = None
    """Reward of this turn; those of an episode are added (`reward.type = "env"`)."""
    done: bool = False
    """True if the episode ends here."""
    calls: int = 0
    """Calls of tools in this turn."""
    failed_calls: int = 0
    """Calls that were malformed, raised, or ran into a limit."""
    seconds: float = 0.0
    """Time spent in tools."""


class Environment:
    """Base of environments. `start` and `step` are enough; the rest has defaults.

    Processes and connections are opened when they are first needed: an environment is also built only to be shown.
    """

    turn_ends: tuple[str, ...] = ()
    """Strings that end a turn of the model besides its end-of-turn token, e.g. ("?",). They stay in the turn's text."""
    role: str = "user"
    """Role in which the chat template shows observations: "tool" or "user". A template without the role "tool" shows "user"."""
    rewinds: bool = True
    """False: a state names a live instance, which moves on with every step and cannot be gone back to. Each episode then has
    an instance of its own, and `finish` releases it."""

    @classmethod
    def build(cls, config: Any, tokenizer: Any) -> Self:
        """Build it from its section and the policy's tokenizer."""
        return cls()

    def start(self, prompt: Prompt) -> State:
        """The state before the first turn."""
        raise NotImplementedError

    def step(self, state: State, text: str) -> Turn:
        """Answer to a turn of the model.

        Depends on its arguments only. What the model did wrong is an observation that says so, never an exception.

        Args:
            state: the state before the turn.
            text: the turn as the model wrote it, special tokens included, without its end-of-turn token.
        """
        raise NotImplementedError

    def step_all(self, items: Sequence[tuple[State, str]]) -> list[Turn]:
        """`step` for the whole batch, in order. An environment that waits for its tools runs them side by side."""
        return [self.step(state, text) for state, text in items]

    def tools(self) -> list[dict[str, Any]] | None:
        """JSON schemas of the tools, which the chat template shows in the prompt; None: no tools."""
        return None

    def finish(self, state: State) -> None:
        """Release the instance that a state names. Called only if `rewinds` is False, once per episode."""

    def close(self) -> None:
        """Release everything that the environment has started. Safe to call twice."""
