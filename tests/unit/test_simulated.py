"""The simulated engine: a known time, and tokens that depend on their key alone."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import harness as bench
from benchmarks.options import BenchOptions
from benchmarks.simulated import Simulation, coin, schedule, take_notes
from benchmarks.suites import distribution
from benchmarks.suites.rounds import PARTS
from benchmarks.workloads import WORKLOADS, Workload
from deepgrpo.engines.base import SamplingParams
from deepgrpo.records import SampleRequest

SMALL = Workload(
    "S", prompts=2, prompt=4, rollouts=3, response=8, failed=2, branches=2, vocabulary=64, hidden=64, layers=2
)  # fmt: skip
STOP = SamplingParams(stop=(" ",))


def simulation(directory: Path, ends: float = 0.05) -> Simulation:
    return Simulation(str(directory), latency_s=0.01, max_rows=2, ends=ends, vocabulary=16)


@pytest.mark.parametrize(
    ("lengths", "rows", "tokens"), [([], 2, 0), ([5, 5, 5], 2, 10), ([9, 2, 3, 4], 2, 9), ([4, 3, 2, 9], 2, 13), ([3, 3], 8, 3)]
)
def test_the_next_row_takes_the_place_of_one_that_ends(lengths: list[int], rows: int, tokens: int) -> None:
    """4, 3, 2, 9 in two rows: 2 follows 3 and ends at 5, 9 follows 4 and ends at 13."""
    assert schedule(lengths, rows) == tokens


def test_it_takes_as_long_as_was_asked_and_says_so(policy: Any, tmp_path: Path) -> None:
    """Three rows of 4 tokens, two at once, 10 ms a token: 80 ms."""
    engine = simulation(tmp_path)(None, policy)  # type: ignore[arg-type]
    began = time.monotonic()
    ((first, second, third),), stats = engine.sample([SampleRequest((1, 2), (7, 8, 9), 4)], SamplingParams())
    assert time.monotonic() - began >= 0.08
    assert [len(each.tokens) for each in (first, second, third)] == [4, 4, 4] and first.finish == "stop"
    assert stats.sampled_tokens == 12 and stats.prefix_tokens == 6
    (note,) = take_notes(tmp_path)
    assert note.asked_s == pytest.approx(0.08) and note.arrived == note.began and note.ended - note.began >= 0.08
    assert take_notes(tmp_path) == []


def test_tokens_depend_on_their_key_alone(policy: Any, tmp_path: Path) -> None:
    engine = simulation(tmp_path)(None, policy)  # type: ignore[arg-type]
    (together,), _ = engine.sample([SampleRequest((1,), (7, 8), 30)], STOP)
    (apart,), _ = engine.sample([SampleRequest((1,), (8,), 30)], STOP)
    assert apart == [together[1]]
    assert all(0 <= token < 16 for each in together for token in each.tokens)


def test_lengths_are_geometric_up_to_the_limit(tmp_path: Path) -> None:
    """Mean of min(length, 40) at 1 in 20: (1 - 0.95^40) / 0.05 = 17.43."""
    lengths = simulation(tmp_path).lengths([SampleRequest((1,), tuple(range(4000)), 40)], STOP)
    assert min(lengths) == 1 and max(lengths) == 40
    assert sum(lengths) / 4000 == pytest.approx(17.43, abs=0.6)  # three standard errors


def test_new_weights_are_noticed(policy: Any, tmp_path: Path) -> None:
    import torch

    engine = simulation(tmp_path)(None, policy)  # type: ignore[arg-type]
    engine.forget()
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.copy_(parameter.clone())
    engine.sample([SampleRequest((1,), (7,), 1)], SamplingParams())
    engine.sample([SampleRequest((1,), (7,), 1)], SamplingParams())
    with_new, without = take_notes(tmp_path)
    assert with_new.arrived < with_new.began and without.arrived == without.began


def test_the_coin_falls_three_times_in_eight() -> None:
    ids = [(i, i + 1) for i in range(2000)]
    rewards = coin([""] * 2000, ids)
    assert set(rewards) == {0.0, 1.0} and rewards == coin([""] * 2000, ids)
    assert sum(rewards) / 2000 == pytest.approx(0.375, abs=0.033)  # three standard errors


def test_without_ray_only_this_process_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(WORKLOADS, "S", SMALL)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(distribution, "MODELS", {"tiny": {"hidden_size": 16, "num_layers": 1, "num_heads": 1}})
    out, path = Console(file=io.StringIO(), width=200), tmp_path / "figures.json"
    arms = ("equal_0", "equal_2", "step_0", "step_1", "call_1", "weights_tiny_1")
    assert bench.run_bench(BenchOptions("distribution", "S", repeats=1, threads=1, arms=arms, json=path), out) == 0
    result = json.loads(path.read_text())
    assert [arm["name"] for arm in result["arms"]] == ["equal_0", "step_0"] and set(result["ratios"]) == {"equal_0"}
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("deepgrpo[cluster]") == 4
    parts = {key: each["median"] for key, each in result["distribution"]["equal_0"]["parts"].items()}
    assert parts["seconds"] == pytest.approx(sum(parts[part] for part in PARTS), abs=2e-5)
