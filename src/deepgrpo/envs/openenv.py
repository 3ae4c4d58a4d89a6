"""Client of an OpenEnv server: each episode has a session of its own there, which cannot be gone back to and is replayed.

    start ─► connect, reset(seed of the prompt) ─► step({"message": turn}) ─► observation, reward, done ─► ... ─► close

The sessions of a batch step side by side. An action that the server refuses is an observation; so is a session that breaks or
does not answer, which also ends the episode. A server that cannot be reached ends the run.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from deepgrpo import rng
from deepgrpo.config import OpenEnv
from deepgrpo.envs.base import Environment, State, Turn
from deepgrpo.envs.toolbox import clean
from deepgrpo.errors import EnvError, first_line, requires_extra
from deepgrpo.records import Prompt

T = TypeVar("T")


class OpenEnvEnvironment(Environment):
    rewinds = False

    def __init__(self, config: OpenEnv) -> None:
        """Connect to nothing yet. Raises MissingExtraError without openenv."""
        with requires_extra("openenv", "openenv", 'env.type = "openenv"'):
            from openenv.core.generic_client import GenericEnvClient
        self._client, self._config = GenericEnvClient, config
        self._sessions: dict[int, Any] = {}
        self._numbers = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    def build(cls, config: OpenEnv, tokenizer: object) -> OpenEnvEnvironment:
        return cls(config)

    def start(self, prompt: Prompt) -> State:
        """Open a session; its number is the state. Raises EnvError if the server opens none."""
        columns = {name: prompt.columns.get(name) for name in self._config.reset_columns}
        seed = rng.key("openenv", prompt.id) >> 33  # 31 bits: the same episode whenever it is replayed
        number = next(self._numbers)
        try:
            self._sessions[number] = self._run(self._open({"seed": seed, **columns}))
        except Exception as error:
            raise EnvError(
                f"env.url is {self._config.url!r}, and the server there opened no session ({type(error).__name__}: "
                f"{first_line(error)}) beside {len(self._sessions)} open ones; start it, or let it serve more sessions "
                "(max_concurrent_envs) or lower run.prompts_per_step or the number of rollouts"
            ) from error
        return number

    def step(self, state: State, text: str) -> Turn:
        return self.step_all([(state, text)])[0]

    def step_all(self, items: Sequence[tuple[State, str]]) -> list[Turn]:
        async def everything() -> list[Turn]:
            return await asyncio.gather(*(self._step(state, clean(text)) for state, text in items))

        return self._run(everything())

    def finish(self, state: State) -> None:
        session = self._sessions.pop(state, None)
        if session is not None:
            self._run(_closed(session))

    def close(self) -> None:
        for state in list(self._sessions):
            self.finish(state)
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
            loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run in a loop of our own: the caller may have one itself."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="deepgrpo-openenv", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self, reset: dict[str, Any]) -> Any:
        session = self._client(base_url=self._config.url, message_timeout_s=self._config.timeout_s)
        await session.connect()
        try:
            await session.reset(**reset)
        except BaseException:
            await _closed(session)
            raise
        return session

    async def _step(self, state: State, text: str) -> Turn:
        began = time.perf_counter()
        try:
            result = await self._sessions[state].step(self._action(text))
        except (RuntimeError, ValueError) as error:  # the server refuses the action
            return _failed(state, clean(f"error: {first_line(error)}"[:500]), began)
        except TimeoutError:
            said = f"error: the environment did not answer within {self._config.timeout_s:g} seconds"
            return _failed(state, said, began, done=True)
        except Exception as error:  # a session that broke
            return _failed(state, f"error: the environment ended the session ({type(error).__name__})", began, done=True)
        reward = None if result.reward is None else float(result.reward)
        return Turn(state, self._shown(result.observation), reward, bool(result.done), 1, 0, time.perf_counter() - began)

    def _action(self, text: str) -> dict[str, Any]:
        """The turn as an action. Raises ValueError if it has to be JSON and is none."""
        if self._config.action is not None:
            return {self._config.action: text}
        try:
            found = json.loads(text)
        except RecursionError:
            found = None
        if not isinstance(found, dict):
            raise ValueError("an action is a JSON object")
        return found

    def _shown(self, observation: Any) -> str:
        field = self._config.observation
        shown = observation.get(field, "") if field is not None and isinstance(observation, dict) else observation
        return clean(shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False))


def _failed(state: State, said: str, began: float, done: bool = False) -> Turn:
    return Turn(state, said, done=done, calls=1, failed_calls=1, seconds=time.perf_counter() - began)


async def _closed(session: Any) -> None:
    try:
        await session.close()
    except Exception:  # it is gone already
        return
