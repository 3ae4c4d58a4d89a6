"""A batch that grows in waves is the batch that grows at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from deepgrpo.config import DeepExplore
from deepgrpo.engines.base import SamplingParams
from deepgrpo.errors import EngineError
from deepgrpo.explore import build_strategy
from deepgrpo.explore.base import Limits, Signals
from deepgrpo.explore.grow import Growth, Judge, grow
from deepgrpo.explore.toy import FakeEngine, Letters, make_judge
from deepgrpo.explore.waves import grow_in_waves
from deepgrpo.records import Prompt

PROMPTS = [Prompt(f"p{i % 3}", "", (1, 2, 3), question="") for i in range(7)]


class Counting(FakeEngine):
    """Knows how many threads were inside at most, and what it was asked after it had forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = self.most = self.forgotten = 0
        self.lock = threading.Lock()

    def sample(self, *arguments: Any, **options: Any) -> Any:
        assert not self.forgotten
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        time.sleep(0.02)
        try:
            return super().sample(*arguments, **options)
        finally:
            with self.lock:
                self.inside -= 1

    def forget(self) -> None:
        self.forgotten += 1


def grown(engine: Any, judge: Judge, waves: int | None) -> Growth:
    strategy = build_strategy(
        DeepExplore.model_validate({"num_rollouts": 4, "branches_per_pivot": 3, "segments": {"type": "tokens", "size": 3}}),
        scale="none", tokenizer=Letters(), task=None,
    )  # fmt: skip

    def wave(prompts: Sequence[Prompt], first: int, *, engine: Any, judge: Judge, signals: Signals | None) -> Growth:
        return grow(
            prompts, strategy, strategy.initial_state(), engine, judge, decode=Letters().decode, params=SamplingParams(),
            limits=Limits(16, 64), seed=5, step=3, signals=signals, first=first,
        )  # fmt: skip

    if waves is None:
        return wave(PROMPTS, 0, engine=engine, judge=judge, signals=None)
    return grow_in_waves(PROMPTS, waves, wave, engine=engine, judge=judge)


@pytest.mark.parametrize("waves", [1, 2, 3, 7, 50])
def test_the_same_trees_and_the_same_bill(waves: int) -> None:
    engine = Counting()
    judging = threading.Lock()
    judge = make_judge()

    def alone(*arguments: Any) -> Any:
        assert judging.acquire(blocking=False), "two waves asked the judge at once"
        try:
            return judge(*arguments)
        finally:
            judging.release()

    began = time.perf_counter()
    found, wanted = grown(engine, alone, waves), grown(FakeEngine(), judge, None)
    assert found.stats.seconds <= time.perf_counter() - began
    assert found.trees == wanted.trees and sum(len(tree.pivots) for tree in found.trees) > 10
    assert found.verifier_calls == wanted.verifier_calls
    assert found.stats.sampled_tokens == wanted.stats.sampled_tokens
    assert found.branches.prefix_tokens == wanted.branches.prefix_tokens > 0
    assert engine.forgotten == 1 and engine.most == min(waves, len(PROMPTS))


def test_an_error_of_one_wave_comes_when_all_have_ended() -> None:
    class Broken(Counting):
        calls = 0

        def sample(self, requests: Any, *arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == 1:
                raise EngineError("no more")
            return super().sample(requests, *arguments, **options)

    engine = Broken()
    with pytest.raises(EngineError, match="no more"):
        grown(engine, make_judge(), 2)
    assert engine.forgotten == 1 and engine.inside == 0 and engine.calls >= 2
