"""Objects of a Python program in a cluster: what stays in the driver, what is pickled, what is refused."""

from __future__ import annotations

import threading
from typing import Any

import pytest

pytest.importorskip("ray")

import ray

from deepgrpo import Stateless
from deepgrpo.cluster.events import Events
from deepgrpo.cluster.rewards import RewardPool, RewardWorker
from deepgrpo.cluster.run import travelling
from deepgrpo.config import Config
from deepgrpo.errors import ConfigError
from deepgrpo.library.given import build_config
from deepgrpo.library.objects import Given
from deepgrpo.prompts.source import build_source
from deepgrpo.rewards import build_reward
from tiny import byte_tokenizer

ROWS = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]


def with_cluster(reward: Any) -> Config:
    recipe = {"cluster": {"reward_workers": 1}, "data": {"template": {"chat": False}}}
    given = Given(model="somewhere", dataset=ROWS, eval_dataset=ROWS, rewards=reward, strategy=Stateless)
    return build_config(recipe, None, given)


def test_rows_and_strategy_stay_and_functions_travel() -> None:
    bonus = 0.5

    def right(completions: list[str], answer: list[str]) -> list[float]:
        return [float(text == wanted) + bonus for text, wanted in zip(completions, answer, strict=True)]

    config = with_cluster([right, right])
    sent = travelling(config)
    assert sent.data.held is sent.explore.held is None and sent.eval.data is not None and sent.eval.data.held is None
    assert config.data.held is ROWS and config.explore.held is Stateless
    worker = RewardWorker(ray.cloudpickle.loads(ray.cloudpickle.dumps(sent)))  # as Ray sends it
    prompts = build_source(config.data, byte_tokenizer(), seed=0, context=64).head(2)
    here = build_reward(config.reward)
    for reward in (worker.reward, here):
        assert [score.value for score in reward.score(prompts, ["1", "1"], [(1,), (2,)])] == [3.0, 1.0]
        reward.close()


def test_a_function_that_cannot_be_pickled_is_refused() -> None:
    lock = threading.Lock()

    def locked(completions: list[str]) -> list[float]:
        with lock:
            return [0.0] * len(completions)

    with pytest.raises(ConfigError, match=r"cannot be pickled does not reach cluster.reward_workers; set cluster.reward_work"):
        RewardPool(travelling(with_cluster(locked)), None, Events(0))
