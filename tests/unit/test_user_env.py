"""A user's environment: loaded from a file, its states kept as values, its mistakes named."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepgrpo.config import UserEnv
from deepgrpo.envs import build_environment
from deepgrpo.envs.base import Environment, Turn
from deepgrpo.errors import ConfigError, EnvError
from deepgrpo.records import Prompt

PROMPT = Prompt("p", "?", (1,), "?")
COUNT = """
class Count:
    turn_ends = ["?"]
    def __init__(self, most=2):
        self.most = most
    def start(self, prompt):
        return {"seen": []}
    def step(self, state, text):
        state["seen"].append(text)
        return {"state": state, "observation": text[::-1], "done": len(state["seen"]) >= self.most, "reward": 1}
"""


def _env(tmp_path: Path, source: str, name: str = "Count", **options: object) -> Environment:
    (tmp_path / "mine.py").write_text(source)
    return build_environment(UserEnv(env=f"{tmp_path / 'mine.py'}:{name}", options=options), None)


def test_states_are_values(tmp_path: Path) -> None:
    env = _env(tmp_path, COUNT, most=3)
    assert env.turn_ends == ("?",)
    assert env.rewinds
    start = env.start(PROMPT)
    first = env.step(start, "ab?")
    assert first == Turn({"seen": ["ab?"]}, "?ba", 1.0)
    assert start == {"seen": []}  # although the class appends to the state that it is given
    left, right = env.step_all([(first.state, "l"), (first.state, "r")])
    assert (left.state, right.state) == ({"seen": ["ab?", "l"]}, {"seen": ["ab?", "r"]})
    assert env.step(left.state, "x").done


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return {'observation': 'x'}", "step returned a dict without 'state'"),
        ("return {'state': 1, 'obs': 'x'}", "step returned the field 'obs'"),
        ("return {'state': {1, 2}}", "which is no plain JSON"),
        ("return {'state': 1, 'observation': 7}", r"returned the observation 7 \(a int\)"),
        ("return {'state': 1, 'reward': 'much'}", "returned the reward 'much'"),
        ("return 'x'", "return a Turn, or a dict with its fields"),
        ("raise KeyError('f')", r"step raised KeyError: 'f' \(.*mine.py, line 5\)"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, body: str, message: str) -> None:
    source = "class Count:\n  def start(self, prompt):\n    return 0\n  def step(self, state, text):\n    "
    env = _env(tmp_path, source + body)
    with pytest.raises(EnvError, match=message):
        env.step(env.start(PROMPT), "x")


def test_what_cannot_be_built(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no method 'step'"):
        _env(tmp_path, "class Count:\n    def start(self, prompt):\n        return 0\n")
    with pytest.raises(ConfigError, match=r"env.options = \{'least': 1\} raised TypeError"):
        _env(tmp_path, COUNT, least=1)
