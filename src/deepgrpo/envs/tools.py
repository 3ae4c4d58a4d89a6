"""The environment of a user's own tools: typed, documented Python functions, called in worker processes (toolbox.py).

    turn ─► calls (calls.py) ─► results, one observation ─► ... ─► a turn without a call ends the episode

A state counts the calls so far. Functions are asked side by side for the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepgrpo.config import ToolsEnv
from deepgrpo.envs.base import Environment, State, Turn
from deepgrpo.envs.calls import CLOSE, FORM, Call, Malformed, build_parser
from deepgrpo.envs.toolbox import Result, Toolbox
from deepgrpo.records import Prompt


class ToolsEnvironment(Environment):
    role = "tool"

    def __init__(self, config: ToolsEnv, tokenizer: Any) -> None:
        """Load the functions. Raises ConfigError if one cannot be loaded or described."""
        self._toolbox = Toolbox(
            config.functions, timeout_s=config.timeout_s, memory_mb=config.memory_mb, output_chars=config.output_chars,
            workers=config.workers,
        )  # fmt: skip
        self._parse = build_parser(tokenizer, self._toolbox.schemas)
        self._most = config.max_calls
        # without a template, nothing else ends a turn that goes on with what the tool might say
        self.turn_ends = () if getattr(tokenizer, "chat_template", None) else (CLOSE,)

    @classmethod
    def build(cls, config: ToolsEnv, tokenizer: Any) -> ToolsEnvironment:
        return cls(config, tokenizer)

    def start(self, prompt: Prompt) -> State:
        return {"calls": 0}

    def step(self, state: State, text: str) -> Turn:
        return self.step_all([(state, text)])[0]

    def step_all(self, items: Sequence[tuple[State, str]]) -> list[Turn]:
        asked = [self._parse(text) for _, text in items]
        wanted = [call for calls in asked for call in calls[: self._most] if isinstance(call, Call)]
        results = iter(self._toolbox.call(wanted))
        return [
            self._turn(state, len(calls), [_malformed(call) if isinstance(call, Malformed) else next(results)
                                           for call in calls[: self._most]])
            for (state, _), calls in zip(items, asked, strict=True)
        ]  # fmt: skip

    def tools(self) -> list[dict[str, Any]]:
        return self._toolbox.schemas

    def close(self) -> None:
        self._toolbox.close()

    def _turn(self, state: State, asked: int, results: Sequence[Result]) -> Turn:
        if asked == 0:
            return Turn(state, done=True)
        texts = [result.text for result in results]
        if asked > len(results):
            texts.append(f"error: {asked} calls in one turn; only the first {self._most} were made")
        return Turn(
            {"calls": state["calls"] + len(results)}, "\n".join(texts), calls=asked,
            failed_calls=sum(result.failed for result in results) + asked - len(results),
            seconds=sum(result.seconds for result in results),
        )  # fmt: skip


def _malformed(call: Malformed) -> Result:
    return Result(f"error: the call cannot be made, {call.said}; write {FORM}", failed=True)
