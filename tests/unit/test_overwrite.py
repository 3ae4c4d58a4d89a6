"""A run that is made again in its own directory."""

from __future__ import annotations

from typing import Any

from deepgrpo.config import load_recipe
from deepgrpo.runs.layout import RunDir
from deepgrpo.train.loop import train


def test_a_run_is_overwritten_only_when_asked_and_leaves_nothing(recipe: Any) -> None:
    run = RunDir(train(recipe(run={"steps": 2}, checkpoint={"every": 1}, log={"trees_every": 1})))
    run.report.write_text("a page of the old run")
    run.final.write_text("{}")
    again = recipe(run={"steps": 1, "seed": 5, "overwrite": True}, log={"trees_every": 1})
    assert train(again) == run.path
    assert sorted(run.tree_files()) == [1] and [path.name for path in run.checkpoints.iterdir()] == ["step-000001"]
    assert not run.report.exists() and not run.final.exists()
    assert "the run that runs/test held is deleted (run.overwrite)" in run.log.read_text()
    # as in a directory of its own; and a resumed run is not deleted, whatever its recipe says
    elsewhere = RunDir(train(recipe(run={"steps": 1, "seed": 5, "name": "elsewhere"}, log={"trees_every": 1})))
    assert _weights(run) == _weights(elsewhere)
    train(load_recipe(run.config, [("run.steps", "2")]), resume=run.path)
    assert sorted(run.tree_files()) == [1, 2]


def _weights(run: RunDir) -> bytes:
    return (run.checkpoint(1) / "model" / "model.safetensors").read_bytes()
