"""Recipes with an environment through the command line: every strategy of turns, then eval, probe and compare."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from commands import Starter

from deepgrpo import cli
from recipes import CHAIN, HELD_OUT, recipe_text

ENVIRONMENT = """
from deepgrpo import Environment, Turn


class Digits(Environment):
    turn_ends = tuple("0123456789+-*=;:#")

    def start(self, prompt):
        return {"left": 3, "total": len(prompt.question)}

    def step(self, state, text):
        worth = int(text[-1]) if text[-1:].isdigit() else 0
        after = {"left": state["left"] - 1, "total": state["total"] + worth}
        return Turn(after, f"{after['total'] % 10};", worth / 5, after["left"] == 0, calls=1, failed_calls=int(worth == 0))
"""
RECIPE = recipe_text(
    CHAIN, run={"steps": 2, "prompts_per_step": 3}, model={"num_layers": 1, "max_position": 96}, warmstart={},
    env={"type": "user", "env": "digits.py:Digits", "max_turns": 4}, reward={"type": "env"},
    sampling={"max_new_tokens": 30}, loss={"beta": 0.0}, log={"trees_every": 1}, checkpoint={"every": 2},
    explore={"num_rollouts": 3, "branches_per_pivot": 2, "segments": {"type": "turn"}, "success_threshold": 1.5},
    eval={"every": 2, "limit": 3, "data": HELD_OUT},
)  # fmt: skip
STRATEGIES: dict[str, tuple[str, ...]] = {
    "allocate": ("--explore.type", "allocate", "--explore.success_threshold", "1.5"),
    "belief": ("--explore.type", "belief", "--explore.cue", "#", "--explore.success_threshold", "1.5"),
    "random": ("--explore.type", "random", "--explore.success_threshold", "1.5"),
    "deep": (),
    "root-only": ("--explore.gamma", "-1000"),
}
EXPERIMENT = """
name = "turns"
seeds = [1, 2]
baseline = "root"
budget = 100
base = "turns.toml"
[common.run]
steps = 9
[common.eval]
every = 9
[final]
limit = 4
sampled_limit = 2
samples = 2
k = [1, 2]
[arms.root.explore]
type = "root"
[arms.deep]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("turns")
    (found / "digits.py").write_text(ENVIRONMENT)
    (found / "turns.toml").write_text(RECIPE)
    (found / "exp.toml").write_text(EXPERIMENT)
    return found


@pytest.fixture(scope="module")
def runs(place: Path) -> dict[str, list[dict[str, Any]]]:
    """A run per strategy: its metrics."""
    before = Path.cwd()
    os.chdir(place)
    try:
        for name, changes in STRATEGIES.items():
            turns = () if name in ("deep", "root-only") else ("--explore.segments", '{type = "turn"}')
            assert cli.main(["train", "turns.toml", "--run.name", name, *changes, *turns]) == 0
    finally:
        os.chdir(before)
    return {
        name: [json.loads(line) for line in (place / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in STRATEGIES
    }


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_branches_at_turns(runs: dict[str, list[dict[str, Any]]], place: Path, name: str) -> None:
    from deepgrpo.runs.trees import load_trees

    last = runs[name][-1]
    assert last["env/turns"] > 1 and last["env/calls"] > 1 and last["ledger/given_tokens"] > 0
    assert last["pivots/count"] > 0 and last["ledger/tool_calls"] > 0 and last["ledger/optimizer_steps"] > 0
    assert last["eval/turns"] > 1 and (name != "belief" or last["ledger/signal_tokens"] > 0)
    assert name != "allocate" or last["allocate/rounds"] > 0
    trees = [tree for step in (1, 2) for tree in load_trees(place / "runs" / name / "trees" / f"step-{step:06d}.jsonl.gz")]
    branched = [(tree, pivot) for tree in trees for pivot in tree.pivots if pivot.stream == "branch"]
    for tree, pivot in branched:
        assert pivot.offset in (0, *(reply.end for reply in tree.nodes[pivot.parent].replies))
    assert any(pivot.offset for _, pivot in branched) == (name != "root-only")


def test_a_run_is_evaluated_with_its_environment(
    runs: Any, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    arguments = ["--limit", "3", "--samples", "2", "--k", "2", "--json", "figures.json"]
    assert cli.main(["eval", "runs/allocate", *arguments]) == 0, capsys.readouterr().err
    (found,) = json.loads((place / "figures.json").read_text())["sets"].values()
    assert found["metrics"]["eval/turns"] == runs["allocate"][-1]["eval/turns"]
    assert found["metrics"]["eval/greedy"] == runs["allocate"][-1]["eval/greedy"]
    assert found["reward"]["type"] == "env" and found["metrics"]["eval/sampled"] > 0


def test_a_probe_plays_episodes(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    small = ("--prompts", "8", "--projection", "64", "--threads", "1", "--strategies", "root", "deep", "random", "allocate")
    assert cli.main(["probe", "turns.toml", *small, "--json", "probe.json"]) == 0, capsys.readouterr().err
    strategies = json.loads((place / "probe.json").read_text())["strategies"]
    assert strategies["root"]["by_prompt"]["branch_tokens"] == [0] * 8
    assert sum(strategies["deep"]["by_prompt"]["branch_tokens"]) > 0


def test_an_experiment_compares_arms_with_an_environment(place: Path, commands: Starter) -> None:
    """Rewards of turns may add up to more than 1, and a final evaluation with such an accuracy is whole."""
    done = commands.run("compare", "exp.toml", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((place / "runs" / "turns" / "comparison.json").read_text())
    assert set(found["arms"]) == {"root", "deep"}
    finals = [json.loads(path.read_text())["metrics"] for path in (place / "runs" / "turns" / "arms").rglob("final.json")]
    assert len(finals) == 4 and all(each["eval/turns"] > 1 for each in finals)
    assert max(each["eval/sampled"] for each in finals) > 1
