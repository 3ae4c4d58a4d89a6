"""The environment of a user's own tools: typed, documented Python functions, called in worker processes (toolbox.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepgrpo.config import ToolsEnv
from deepgrpo.envs.base import State
from deepgrpo.envs.calling import CallingEnvironment
from deepgrpo.envs.calls import Call
from deepgrpo.envs.toolbox import Result, Toolbox


class ToolsEnvironment(CallingEnvironment):
    def __init__(self, config: ToolsEnv, tokenizer: Any) -> None:
        """Load the functions. Raises ConfigError if one cannot be loaded or described."""
        self._toolbox = Toolbox(
            config.functions, timeout_s=config.timeout_s, memory_mb=config.memory_mb, output_chars=config.output_chars,
            workers=config.workers,
        )  # fmt: skip
        super().__init__(tokenizer, self._toolbox.schemas, config.max_calls)

    @classmethod
    def build(cls, config: ToolsEnv, tokenizer: Any) -> ToolsEnvironment:
        return cls(config, tokenizer)

    def results(self, calls: Sequence[tuple[State, Call]]) -> list[Result]:
        return self._toolbox.call([call for _, call in calls])

    def close(self) -> None:
        self._toolbox.close()
