"""The environment of the lookup task (prompts/lookup.py): one lookup per turn, each at a price.

    3fgh:   f3? ─► 7;   g8? ─► 4;   g7? ─► 2;   h2? ─► 5;   #5 ─► reward 1, less the price of four lookups

A state is {"question", "table", "found"}: `found` counts the hops whose right lookup was asked so far.
"""

from __future__ import annotations

from deepgrpo.config import LookupEnv
from deepgrpo.envs.base import Environment, State, Turn
from deepgrpo.prompts.lookup import ANSWER, ASK, look_up, observation, right_lookups, table_of
from deepgrpo.records import Prompt


class LookupEnvironment(Environment):
    turn_ends = (ASK,)

    def __init__(self, price: float) -> None:
        """Nothing is started.

        Args:
            price: subtracted from the reward for each lookup, malformed ones included.
        """
        self._price = price

    @classmethod
    def build(cls, config: LookupEnv, tokenizer: object) -> LookupEnvironment:
        return cls(config.price)

    def start(self, prompt: Prompt) -> State:
        """Raises DataError if the prompt has no table."""
        return {"question": prompt.question, "table": table_of(prompt), "found": 0}

    def step(self, state: State, text: str) -> Turn:
        right, answer = right_lookups(state["question"], state["table"])
        found = state["found"]
        if not text.endswith(ASK):
            solved = found == len(right) and text.strip() == ANSWER + answer
            return Turn(state, reward=float(solved), done=True)
        hit = found < len(right) and text == right[found]
        return Turn(
            {**state, "found": found + hit}, observation(state["table"], text), -self._price, calls=1,
            failed_calls=int(look_up(state["table"], text) is None),
        )  # fmt: skip
