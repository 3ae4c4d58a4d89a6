"""The client of OpenEnv, against a server of its own on 127.0.0.1. Skipped without the extra `openenv`."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from deepgrpo.config import OpenEnv, parse_section
from deepgrpo.envs.openenv import OpenEnvEnvironment
from deepgrpo.errors import ConfigError, EnvError, MissingExtraError
from deepgrpo.records import Prompt

PROMPT = Prompt("p", "q", (1,), "q", columns={"goal": 2})
HOSTILE = ["", "\x1b[2J", "\ud800", "<|im_end|>", "x" * 100_000, "\x00", "{}"]


def make_app() -> Any:
    from openenv.core.env_server import create_app
    from openenv.core.env_server.interfaces import Environment
    from openenv.core.env_server.types import Action, Observation, State

    class Say(Action):
        message: str

    class Heard(Observation):
        reply: str = ""

    class Counter(Environment):  # type: ignore[misc]
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            super().__init__()
            self.seed, self.goal, self.count = 0, 0, 0

        def reset(self, seed: int | None = None, episode_id: str | None = None, goal: int = 0, **kwargs: Any) -> Heard:
            self.seed, self.goal, self.count = seed or 0, goal, 0
            return Heard(reply="ready")

        def step(self, action: Say, timeout_s: float | None = None, **kwargs: Any) -> Heard:
            if action.message == "hang":
                time.sleep(3)
            if action.message == "raise":
                raise ValueError("not like this")
            self.count += 1
            done = self.count == self.goal
            return Heard(reply=f"{self.seed} {self.count} {len(action.message)}", reward=float(done), done=done)

        @property
        def state(self) -> State:
            return State(step_count=self.count)

    return create_app(Counter, Say, Heard, env_name="counter", max_concurrent_envs=8)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    pytest.importorskip("openenv")
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def environment(url: str) -> Iterator[OpenEnvEnvironment]:
    config = OpenEnv(url=url, observation="reply", reset_columns=("goal",))
    made = OpenEnvEnvironment.build(config, None)
    yield made
    made.close()
    made.close()


def test_an_episode_and_its_replay(environment: OpenEnvEnvironment) -> None:
    """Two sessions of one prompt say the same; each counts for itself."""
    one, other = environment.start(PROMPT), environment.start(PROMPT)
    first = environment.step(one, "hello")
    assert not environment.rewinds and (first.state, first.reward, first.done, first.calls) == (one, 0.0, False, 1)
    both = environment.step_all([(one, "bye"), (other, "hello")])
    assert (both[0].done, both[0].reward, both[0].observation.split()[1:]) == (True, 1.0, ["2", "3"])
    assert both[1].observation == first.observation
    environment.finish(one)
    environment.finish(other)
    assert environment.step(environment.start(PROMPT), "hello").observation == first.observation


def test_what_goes_wrong_is_an_observation(environment: OpenEnvEnvironment, url: str) -> None:
    state = environment.start(PROMPT)
    refused = environment.step(state, "raise")
    assert refused.failed_calls == 1 and "not like this" in refused.observation
    for text in HOSTILE:
        turn = environment.step(state, text)
        turn.observation.encode()
    spoken = OpenEnvEnvironment(OpenEnv(url=url, action=None))
    try:
        state = spoken.start(PROMPT)
        assert spoken.step(state, '{"message": "ab"}').observation.endswith('1 2"}')
        assert spoken.step(state, "no JSON").failed_calls == 1 and spoken.step(state, "[1]").failed_calls == 1
        assert spoken.step(state, '{"other": 1}').failed_calls == 1
    finally:
        spoken.close()


def test_a_session_that_hangs_ends_its_episode(url: str) -> None:
    environment = OpenEnvEnvironment(OpenEnv(url=url, timeout_s=0.5))
    try:
        turn = environment.step(environment.start(PROMPT), "hang")
    finally:
        environment.close()
    assert turn.done and turn.observation == "error: the environment did not answer within 0.5 seconds"


def test_a_server_that_opens_no_session_is_an_error(environment: OpenEnvEnvironment) -> None:
    def fill() -> None:
        for _ in range(9):  # it serves eight, and some may still be closing
            environment.start(PROMPT)

    with pytest.raises(EnvError, match=r"opened no session .* beside \d open ones; start it, or let it serve more sessions"):
        fill()
    nowhere = OpenEnvEnvironment(OpenEnv(url="http://127.0.0.1:9"))
    with pytest.raises(EnvError, match=r"env.url is 'http://127.0.0.1:9', and the server there opened no session"):
        nowhere.start(PROMPT)
    nowhere.close()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"url is .127"):
        parse_section(OpenEnv, {"url": "127.0.0.1:8000"}, "env")
    monkeypatch.setitem(sys.modules, "openenv", None)
    monkeypatch.setitem(sys.modules, "openenv.core.generic_client", None)
    with pytest.raises(MissingExtraError, match=r"deepgrpo\[openenv\]"):
        OpenEnvEnvironment(OpenEnv(url="http://127.0.0.1:9"))
