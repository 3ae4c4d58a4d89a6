"""The loop by an engine without a model: when it saves and ends, and what is sampled ahead."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepgrpo import rng
from deepgrpo.config import Config, load_recipe
from deepgrpo.engines.base import SampleStats, SamplingParams
from deepgrpo.explore.toy import FakeEngine
from deepgrpo.model.policy import Policy
from deepgrpo.records import Completion, SampleRequest
from deepgrpo.train.backend import LocalBackend, Parts
from deepgrpo.train.loop import train

REWARD = Path(__file__).parents[1] / "golden" / "reward.py"


class Digits(FakeEngine):
    """Four tokens out of the characters of the synthetic task, drawn from the key alone, and no EOS."""

    exact = False  # its log-probs are not the policy's

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        groups = [[self._completion(key) for key in request.keys] for request in requests]
        return groups, SampleStats(sampled_tokens=sum(len(c.tokens) for group in groups for c in group))

    def _completion(self, key: int) -> Completion:
        draws = rng.uniforms([key] * 4, range(4))
        return Completion(tuple(4 + int(14 * draw) for draw in draws), (-2.5,) * 4, "length")


class Backend(LocalBackend):
    """A local backend with other flags."""

    def __init__(self, **flags: Any) -> None:
        super().__init__(lambda config, policy: Digits())
        self.flags = flags
        self.steps = 0

    def open(self, config: Config, policy: Policy, task: Any) -> Parts:
        def begin_step() -> None:
            self.steps += 1

        return replace(super().open(config, policy, task), begin_step=begin_step, **self.flags)


@pytest.fixture
def short(recipe: Any) -> Any:
    """Root with 4 prompts of 4 rollouts: 64 tokens a step."""

    def make(name: str, **sections: Any) -> Config:
        return recipe(  # type: ignore[no-any-return]
            run={"name": name, "prompts_per_step": 4, **sections.pop("run", {})},
            explore={"type": "root", "num_rollouts": 4}, sampling={"max_new_tokens": 4},
            reward={"type": "user", "function": f"{REWARD}:reward", "truncated_value": "none"}, **sections,
        )  # fmt: skip

    return make


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def saved(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


def test_a_budget_is_spent_when_it_is_reached(short: Any) -> None:
    """Two steps are 128 tokens exactly: there is no third, and a budget of one token more takes it."""
    for budget, steps in ((128, 2), (129, 3)):
        run = train(short(f"budget-{budget}", run={"steps": 9, "max_sampled_tokens": budget}), backend=Backend())
        assert [line["ledger/sampled_tokens"] for line in lines(run)] == [64 * (i + 1) for i in range(steps)]


def test_when_it_saves(short: Any) -> None:
    kept = {"checkpoint": {"every": 2, "keep_last": 9}, "run": {"steps": 5}}
    assert saved(train(short("plain", **kept), backend=Backend())) == [2, 4, 5]
    # the start too, where a learner may be lost
    assert saved(train(short("losing", **kept), backend=Backend(loses_learners=True))) == [0, 2, 4, 5]
    assert saved(train(short("last", checkpoint={"every": None}, run={"steps": 3}), backend=Backend())) == [3]


def test_evaluations_at_marks_of_sampled_tokens(short: Any) -> None:
    """64 tokens a step: 100, 200 and 300 are passed in steps 2, 4 and 5, and step 6 is the last; no matter where it resumes."""
    evaluated = {"every_tokens": 100, "limit": 2, "data": {"type": "synthetic", "chain_length": 2, "split": "test"}}
    sections = {"eval": evaluated, "checkpoint": {"every": 1, "keep_last": 9, "keep_best": False}, "run": {"steps": 6}}
    run = train(short("marks", **sections), backend=Backend())

    def evaluations() -> list[tuple[int, float]]:
        return [(line["step"], line["eval/greedy"]) for line in lines(run) if "eval/greedy" in line]

    found = evaluations()
    assert [step for step, _ in found] == [0, 2, 4, 5, 6]
    for step in (1, 3):
        train(load_recipe(run / "config.toml"), resume=run, step=step, backend=Backend())
        assert evaluations() == found
    # a mark that a large step passes several times over counts once
    sections |= {"eval": {**evaluated, "every_tokens": 10}, "run": {"steps": 2}}
    run = train(short("small", **sections), backend=Backend())
    assert [step for step, _ in evaluations()] == [0, 1, 2]
    assert "data/epochs" not in lines(run)[-1]  # endless questions


def test_epochs_over_finite_data(short: Any) -> None:
    """4 of 16 prompts a step."""
    run = train(short("finite", run={"steps": 5}, data={"size": 16}), backend=Backend())
    assert [line["data/epochs"] for line in lines(run)] == [0.25, 0.5, 0.75, 1.0, 1.25]


def test_an_overlapping_backend_samples_ahead_but_not_across_a_checkpoint(short: Any) -> None:
    """Draws depend on keys alone, so the trees are those of a run that samples in turn; the weights are one step older."""
    sections = {"checkpoint": {"every": 3, "keep_last": 9}, "run": {"steps": 5}}
    in_turn, ahead = Backend(), Backend(overlaps=True)
    plain = lines(train(short("plain", **sections), backend=in_turn))
    overlapped = lines(train(short("overlapped", **sections), backend=ahead))
    # a batch each; step 4 follows a checkpoint, and nothing is sampled behind the last step
    assert in_turn.steps == ahead.steps == 5
    assert [line["overlap/staleness"] for line in overlapped] == [0, 1, 1, 0, 1]
    for one, other in zip(plain, overlapped, strict=True):
        assert "overlap/staleness" not in one
        for key in ("main/reward", "main/mixed", "ledger/sampled_tokens", "main/loss", "grad_norm"):
            assert one[key] == other[key], key
        assert one["grad_norm"] > 0


def test_a_budget_counts_the_batch_that_is_not_in_the_ledger_yet(short: Any) -> None:
    """128 tokens are two steps: while the second is learned from, no third is sampled."""
    backend = Backend(overlaps=True)
    train(short("budget", run={"steps": 9, "max_sampled_tokens": 128}), backend=backend)
    assert backend.steps == 2
