"""Base of environments whose turns are calls of tools.

    turn ─► calls (calls.py) ─► results, one observation ─► ... ─► a turn without a call ends the episode

The calls of the whole batch are made together. A state counts those of its episode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepgrpo.envs.base import Environment, State, Turn
from deepgrpo.envs.calls import Call, Malformed, build_parser
from deepgrpo.envs.toolbox import Result
from deepgrpo.prompts.tool_prompt import CLOSE, FORM
from deepgrpo.records import Prompt


class CallingEnvironment(Environment):
    role = "tool"

    def __init__(self, tokenizer: Any, schemas: Sequence[Mapping[str, Any]], max_calls: int) -> None:
        """Raises ModelError if the tokenizer's response template cannot be used.

        Args:
            tokenizer: of the policy; it has the form of a call.
            schemas: JSON schemas of the tools.
            max_calls: most calls in one turn.
        """
        self._schemas, self._most = [dict(schema) for schema in schemas], max_calls
        self._parse = build_parser(tokenizer, self._schemas)
        # without a template, nothing else ends a turn that goes on with what the tool might say
        self.turn_ends = () if getattr(tokenizer, "chat_template", None) else (CLOSE,)

    def results(self, calls: Sequence[tuple[State, Call]]) -> list[Result]:
        """One result per call, each made in an episode of that state."""
        raise NotImplementedError

    def last(self, state: State, text: str) -> Turn:
        """The end of an episode, after a turn without a call."""
        return Turn(state, done=True)

    def start(self, prompt: Prompt) -> State:
        return {"calls": 0}

    def step(self, state: State, text: str) -> Turn:
        return self.step_all([(state, text)])[0]

    def step_all(self, items: Sequence[tuple[State, str]]) -> list[Turn]:
        asked = [self._parse(text) for _, text in items]
        made = iter(
            self.results(
                [(state, call) for (state, _), calls in zip(items, asked, strict=True) for call in calls[: self._most]
                 if isinstance(call, Call)]
            )
        )  # fmt: skip
        turns: list[Turn] = []
        for (state, text), calls in zip(items, asked, strict=True):
            found = [_malformed(call) if isinstance(call, Malformed) else next(made) for call in calls[: self._most]]
            turns.append(self._turn(state, len(calls), found) if calls else self.last(state, text))
        return turns

    def tools(self) -> list[dict[str, Any]]:
        return self._schemas

    def _turn(self, state: State, asked: int, results: Sequence[Result]) -> Turn:
        texts = [result.text for result in results]
        if asked > len(results):
            texts.append(f"error: {asked} calls in one turn; only the first {self._most} were made")
        return Turn(
            {**state, "calls": state["calls"] + len(results)}, "\n".join(texts), calls=asked,
            failed_calls=sum(result.failed for result in results) + asked - len(results),
            seconds=sum(result.seconds for result in results),
        )  # fmt: skip


def _malformed(call: Malformed) -> Result:
    return Result(f"error: the call cannot be made, {call.said}; write {FORM}", failed=True)
