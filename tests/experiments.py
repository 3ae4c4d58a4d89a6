"""A small experiment file, and its finished runs written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepgrpo.lab.compare.experiment import load_experiment
from deepgrpo.lab.compare.plan import Plan, PlannedRun, expand
from deepgrpo.ledger import Ledger
from deepgrpo.runs.checkpoints import TrainState
from recipes import CHAIN, HELD_OUT, recipe_text

BASE = """
[run]
steps = 50
prompts_per_step = 8
[model]
type = "scratch"
[warmstart]
steps = 40
[data]
type = "synthetic"
chain_length = 2
[reward]
type = "task"
[explore]
type = "deep"
gamma = 3.0
num_rollouts = 4
branches_per_pivot = 4
[explore.segments]
type = "tokens"
size = 3
[eval]
every = 5
limit = 16
[eval.data]
type = "synthetic"
chain_length = 2
split = "test"
"""
TRAINABLE = recipe_text(
    {**CHAIN, "run": {"steps": 400, "prompts_per_step": 8, "device": "cpu"}}, model={"max_position": 32}, loss={"beta": 0.0},
    checkpoint={"every": 2}, log={"trees_every": "none"}, eval={"every": 4, "limit": 8, "samples": 1, "data": HELD_OUT},
)  # fmt: skip
"""A base recipe whose runs take a second."""
EXPERIMENT = """
name = "trial"
dir = "out"
seeds = [1, 2]
baseline = "grpo"
budget = 10_000
base = "base.toml"
[final]
limit = 32
sampled_limit = 8
samples = 4
k = [1, 4]
[arms.grpo.explore]
type = "root"
[arms.deep]
"""


def planned(place: Path, text: str = EXPERIMENT) -> Plan:
    """The plan of an experiment; its base recipe is written beside it."""
    (place / "base.toml").write_text(BASE)
    path = place / "exp.toml"
    path.write_text(text)
    return expand(load_experiment(path), path)


def write_run(plan: Plan, name: str, lines: list[dict[str, Any]], greedy: float, sampled: float) -> None:
    """A finished run, with a line torn by a kill at the end of its metrics."""
    run = next(run for run in plan.runs if run.name == name)
    write_lines(run, lines)
    with run.paths.metrics.open("a") as file:
        file.write('{"step": 9, "to')
    metrics = {"eval/greedy": greedy, "eval/sampled": sampled, "eval/pass@1": sampled, "eval/pass@4": 0.9}
    final = {"spec": plan.final.model_dump(mode="json"), "step": lines[-1]["step"], "metrics": metrics}
    (run.directory / "final.json").write_text(json.dumps(final))


def write_lines(run: PlannedRun, lines: list[dict[str, Any]]) -> None:
    """The metrics of a run and the state of its last checkpoint."""
    step, tokens = lines[-1]["step"], lines[-1]["ledger/sampled_tokens"]
    state = run.directory / "checkpoints" / f"step-{step:06d}" / "state.json"
    state.parent.mkdir(parents=True, exist_ok=True)
    state.write_text(TrainState(step, ledger=Ledger(sampled_tokens=tokens)).to_json())
    run.paths.metrics.write_text("".join(json.dumps(each) + "\n" for each in lines))


def line(step: int, tokens: int, steps: int, greedy: float | None = None, **more: float) -> dict[str, Any]:
    shown = {} if greedy is None else {"eval/greedy": greedy, "eval/sampled": greedy / 2}
    return {"step": step, **shown, **more, "ledger/sampled_tokens": tokens, "ledger/optimizer_steps": steps}
