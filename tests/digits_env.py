"""A tiny environment for tests: a digit answers a turn that ends with one of `turn_ends`; any other turn is the last."""

from __future__ import annotations

from deepgrpo.envs.base import Environment, State, Turn
from deepgrpo.records import Prompt


class Digits(Environment):
    """The state counts turns and characters, and the observation depends on both."""

    turn_ends = ("=",)

    def start(self, prompt: Prompt) -> State:
        return {"seed": len(prompt.question), "turns": 0, "characters": 0}

    def step(self, state: State, text: str) -> Turn:
        after = {**state, "turns": state["turns"] + 1, "characters": state["characters"] + len(text)}
        total = after["seed"] + 3 * after["turns"] + after["characters"]
        asked = text.endswith(self.turn_ends)
        return Turn(
            after, f"{total % 10};", reward=total % 3 - 1.0, done=not asked, calls=int(asked), failed_calls=int(len(text) > 6)
        )


class Server(Digits):
    """The same behind live instances, which move on with every step; `flaky` ones answer otherwise when they are replayed."""

    rewinds = False

    def __init__(self, flaky: bool = False) -> None:
        self.flaky, self.live, self.started, self.steps = flaky, {}, 0, 0  # type: ignore[var-annotated]

    def start(self, prompt: Prompt) -> State:
        self.started += 1
        self.live[self.started] = super().start(prompt)
        return self.started

    def step(self, state: State, text: str) -> Turn:
        self.steps += 1
        turn = super().step(self.live[state], text)
        self.live[state] = turn.state
        observation = f"{self.steps % 10};" if self.flaky else turn.observation
        return Turn(state, observation, turn.reward, turn.done, turn.calls, turn.failed_calls)

    def finish(self, state: State) -> None:
        del self.live[state]
