"""A run that fails saves what it reached, says how to go on, and then equals a run that never failed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepgrpo.config import Config, load_recipe
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.errors import DeepGRPOError, EngineError, RewardError, StrategyError, TrainingError
from deepgrpo.runs.layout import RunDir, shown
from deepgrpo.train.loop import train

REWARD = """
import pathlib
def reward(completions, completion_ids, **columns):
    call = pathlib.Path(__file__).with_name("calls")
    count = int(call.read_text()) + 1 if call.exists() else 1
    call.write_text(str(count))
    if count == FAILS:
        raise ValueError("the judge is down")
    return [float(sum(ids) % 3) for ids in completion_ids]
"""


@pytest.fixture
def small(recipe: Any, tmp_path: Path) -> Callable[..., Config]:
    """Root with 2 prompts of 3 rollouts, and the user's reward, one call a step; its call number `fails` raises."""

    def make(name: str, fails: int = 0, **sections: Any) -> Config:
        (tmp_path / name).mkdir()
        file = tmp_path / name / "mine.py"
        file.write_text(REWARD.replace("FAILS", str(fails)))
        return recipe(  # type: ignore[no-any-return]
            run={"name": name, "prompts_per_step": 2, "steps": 4, **sections.pop("run", {})},
            explore=sections.pop("explore", {"type": "root", "num_rollouts": 3}), sampling={"max_new_tokens": 6},
            reward={"type": "user", "function": f"{file}:reward", "truncated_value": "none"},
            checkpoint={"every": 3}, **sections,
        )  # fmt: skip

    return make


def saved(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    found = RunDir(run).checkpoint(step)
    return load_file(found / "model" / "model.safetensors") | load_file(found / "optimizer.safetensors")


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def fail(config: Config, kind: type[DeepGRPOError], message: str) -> Path:
    with pytest.raises(kind) as error:
        train(config)
    assert re.search(message, str(error.value), re.DOTALL), str(error.value)
    assert f"deepgrpo train --resume {shown(Path(config.run.dir) / config.run.name)}" in str(error.value)
    return Path(config.run.dir) / config.run.name


def test_a_reward_that_fails_costs_no_step_and_the_resumed_run_equals_a_whole_one(small: Any) -> None:
    run = fail(
        small("failing", fails=3), RewardError,
        r"raised ValueError: the judge is down \(.*mine.py, line 8\).*\nthe state after step 2 is saved; continue with",
    )
    assert (saved(run), steps(run)) == ([2], [1, 2])
    train(load_recipe(run / "config.toml"), resume=run)
    whole = train(small("whole"))
    assert steps(run) == steps(whole) == [1, 2, 3, 4]
    for name, value in weights(whole, 4).items():
        assert torch.equal(value, weights(run, 4)[name]), name


def test_nothing_is_saved_twice_and_nothing_before_the_first_step(small: Any) -> None:
    run = fail(small("due", fails=4), RewardError, "the checkpoint of step 3 has all steps so far")
    assert saved(run) == [3]
    run = fail(small("first", fails=1), RewardError, "no step was taken; continue with")
    assert not (run / "checkpoints").exists()
    assert steps(train(load_recipe(run / "config.toml"), resume=run)) == [1, 2, 3, 4]


def test_the_warm_start_is_kept(small: Any) -> None:
    warm = {"warmstart": {"steps": 2, "batch_size": 2, "target_accuracy": None}}
    kept = r"the weights of the warm start are kept in .*warm/start; continue with"
    run = fail(small("warm", fails=1, **warm), RewardError, kept)
    before = (run / "start" / "model.safetensors").read_bytes()
    train(load_recipe(run / "config.toml"), resume=run)
    assert (run / "start" / "model.safetensors").read_bytes() == before
    assert "the run begins with the weights of its warm start" in (run / "log.txt").read_text()


def test_a_warm_start_that_is_not_finished(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def accuracy(run: Any) -> float:
        raise RewardError("the judge is down")

    monkeypatch.setattr("deepgrpo.train.warmstart.sampled_accuracy", accuracy)
    held_out = {"every": 4, "limit": 2, "data": {"type": "synthetic", "chain_length": 2, "split": "test"}}
    warm = {"warmstart": {"steps": 4, "batch_size": 2, "check_every": 1, "target_accuracy": 1.0}, "eval": held_out}
    fail(small("half", **warm), RewardError, "the warm start was not finished; begin again with")


def test_an_evaluation_that_fails_keeps_its_step_and_is_made_up_for(small: Any) -> None:
    """Evaluation at 0, 2 and 4: the calls of the reward are eval, 1, 2, eval, 3, 4, eval, and the fourth raises."""
    held_out = {"every": 2, "limit": 2, "data": {"type": "synthetic", "chain_length": 2, "split": "test"}}
    run = fail(small("failing", fails=4, eval=held_out), RewardError, "the state after step 2 is saved")
    assert (saved(run), steps(run)) == ([2], [0, 1])
    train(load_recipe(run / "config.toml"), resume=run)
    assert steps(run) == [0, 1, 2, 3, 4]
    whole = train(small("whole", eval=held_out))
    for step in (2, 4):
        assert RunDir(run).eval(step).read_bytes() == RunDir(whole).eval(step).read_bytes()
    for name, value in weights(whole, 4).items():
        assert torch.equal(value, weights(run, 4)[name]), name


LOSS = """
from deepgrpo.loss.inputs import LossOutput
calls = 0
def loss(inputs, config):
    global calls
    calls += 1
    if calls == {fails}:
        raise ValueError("no loss")
    return LossOutput(-inputs.logprob_N * inputs.advantage_N)
"""


def test_a_loss_that_fails(small: Any, tmp_path: Path) -> None:
    """The trial takes two calls and each step one; the first call of step 3 is the fifth.

    Every load of the file is a module of its own with its own count: the learner's.
    """
    file = tmp_path / "loss.py"
    file.write_text(LOSS.format(fails=5))
    config = small("loss", loss={"policy": f"{file}:loss"})
    run = fail(config, TrainingError, r"raised ValueError: no loss .*the state after step 2 is saved")
    assert saved(run) == [2]


def test_an_update_that_is_half_done_is_not_saved(small: Any, tmp_path: Path) -> None:
    file = tmp_path / "loss.py"
    file.write_text(LOSS.format(fails=6))  # two optimizer steps a step: the second one of step 2
    config = small("half", loss={"policy": f"{file}:loss"}, optim={"minibatches": 2, "lr": 1e-3})
    run = fail(config, TrainingError, "the update of step 2 was half done, so it was not saved: there is no checkpoint yet")
    assert not (run / "checkpoints").exists()


STRATEGY = """
from deepgrpo.explore.root import RootStrategy
class Mine(RootStrategy):
    @classmethod
    def build(cls, config, context):
        from deepgrpo.config import parse_section
        from deepgrpo.config.explore import RootExplore
        return RootStrategy.build.__func__(cls, RootExplore(num_rollouts=3), context)
    def {method}(self, *given):
        seen.append(1)
        if len(seen) == {fails}:
            raise ValueError("no plan")
        return super().{method}(*given)
seen = []
"""


@pytest.mark.parametrize(("method", "fails"), [("plan", 5), ("credit", 5), ("observe", 3), ("report", 3)])
def test_a_strategy_that_fails(small: Any, tmp_path: Path, method: str, fails: int) -> None:
    """Two prompts: plan is asked twice per prompt, credit once, observe and report once a step."""
    fails = 2 * fails - 1 if method == "plan" else fails
    file = tmp_path / "strategy.py"
    file.write_text(STRATEGY.format(method=method, fails=fails))
    config = small(method, explore={"type": "user", "strategy": f"{file}:Mine", "num_rollouts": 3})
    run = fail(config, StrategyError, rf"{method} raised ValueError: no plan .*the state after step 2 is saved")
    assert saved(run) == [2]


def test_an_engine_that_fails_and_a_bug(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = EmbeddedEngine.sample
    left = [2]
    kind: type[Exception] = EngineError

    def failing(self: Any, *given: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise kind("the device is gone")
        return sample(self, *given, **named)

    monkeypatch.setattr(EmbeddedEngine, "sample", failing)
    run = fail(small("engine"), EngineError, "the device is gone\nthe state after step 2 is saved")
    assert saved(run) == [2]
    left[0], kind = 2, ZeroDivisionError  # an error that is not ours keeps its traceback, and gets a note
    with pytest.raises(ZeroDivisionError) as error:
        train(small("bug"))
    assert error.value.__notes__ == [
        f"the state after step 2 is saved; continue with: deepgrpo train --resume {shown(run.parent / 'bug')}"
    ]


@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_weights_that_are_not_finite_are_not_saved(small: Any, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    from deepgrpo.train.learner import Learner

    update = Learner.update

    def broken(self: Any, *given: Any) -> Any:
        found = update(self, *given)
        if self.optimizer_steps == 2:
            next(iter(self.policy.trainable().values())).data.view(-1)[0] = float(value)
        return found

    monkeypatch.setattr(Learner, "update", broken)
    with pytest.raises(DeepGRPOError, match="the weights after step 2 are not finite, so they were not saved"):
        train(small(value, fails=3))
