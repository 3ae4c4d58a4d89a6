"""Whole runs on a real Ray: the numbers of one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from cluster_runs import TWO, assert_same, counters, recipe, trace
from deepgrpo.cluster.run import train_on_cluster
from deepgrpo.config import Config, load_recipe, parse_config
from deepgrpo.errors import ConfigError
from deepgrpo.runs.trees import load_trees
from deepgrpo.train.loop import train


def test_a_run_on_two_nodes_is_the_run_of_one_process(shared: None, alone: Path, tmp_path: Path) -> None:
    run = train_on_cluster(recipe(tmp_path, "two", TWO))
    assert_same(run, alone)
    assert counters(run) == {"rollout_workers": 2}
    said = "cluster of 2 nodes: 2 rollout workers, 2 learners (ddp, gloo), threads: 1 per rollout worker, 1 per learner"
    assert said in (run / "log.txt").read_text()


def test_shards_are_resumed_by_another_number_of_learners(shared: None, alone: Path, tmp_path: Path) -> None:
    """Two steps by two sharded learners, the third by one with everything; the checkpoint's model is a plain HF one."""
    run = train_on_cluster(recipe(tmp_path, "shards", {**TWO, "sharding": "fsdp"}, steps=2))
    assert (run / "checkpoints" / "step-000002" / "optimizer" / ".metadata").is_file()
    assert (run / "checkpoints" / "step-000002" / "model" / "model.safetensors").is_file()
    changes = [("run.steps", "3"), ("cluster.learners", "1"), ("cluster.sharding", "ddp")]
    train_on_cluster(load_recipe(run / "config.toml", changes), resume=run)
    assert_same(run, alone)
    # and one process goes on from what a group with everything has saved
    train(load_recipe(run / "config.toml", [("run.steps", "4"), ("cluster", "none")]), resume=run)
    assert [line["step"] for line in trace(run)] == [0, 1, 2, 3, 4]


def test_overlap_samples_by_the_weights_of_the_step_before(shared: None, tmp_path: Path) -> None:
    """Steps 2 and 4 are sampled one update behind; not step 3, so that a run goes on from checkpoint 2 as it would have."""
    config = recipe(tmp_path, "overlap", {"rollout_workers": 2, "learners": 1, "overlap": True}, steps=4)
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 2, "keep_last": 9})})
    run = train_on_cluster(config)
    lines = trace(run)[1:]
    assert [line["overlap/staleness"] for line in lines] == [0, 1, 0, 1]
    for line in lines:
        # a weight of learner / sampler is 1 up to rounding where the two are the same policy
        assert (abs(line["mismatch/weight"] - 1) < 1e-5) == (line["overlap/staleness"] == 0)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    train_on_cluster(load_recipe(run / "config.toml"), resume=run)
    for again, before in zip(trace(run)[1:], lines, strict=True):
        for key in ("branch/loss", "main/surprisal", "grad_norm", "mismatch/weight", "ledger/sampled_tokens"):
            assert again.get(key) == pytest.approx(before.get(key), rel=1e-5, abs=1e-5)


def test_learners_measure_beliefs(shared: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the numbers of one process, of whose forward passes the driver makes none."""
    belief = {"explore": {"type": "belief", "cue": "#", "num_rollouts": 4, "branches_per_pivot": 2,
                          "segments": {"type": "tokens", "size": 3}}}  # fmt: skip

    def of(name: str, cluster: dict[str, Any] | None = None) -> Config:
        return parse_config({**recipe(tmp_path, name, cluster, steps=3).model_dump(), **belief})

    one = train(of("one"))
    monkeypatch.setattr("deepgrpo.train.belief.pack_logprobs", None)  # in this process, not in those of the learners
    two = train_on_cluster(of("two", {"rollout_workers": 2, "learners": 1}))
    assert_same(two, one)
    assert all(line["belief/first"] > 0 and line["ledger/signal_tokens"] > 0 for line in trace(two)[1:])


def test_a_cluster_that_is_too_small_is_refused(two_nodes: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster.learners is 9, and each asks for 1 CPU, but the cluster has \d; lower it"):
        train_on_cluster(recipe(tmp_path, "many", {"learners": 9}))
    with pytest.raises(ConfigError, match=r"together ask for 11 CPUs, but the cluster has \d; lower one of them"):
        train_on_cluster(recipe(tmp_path, "many", {"rollout_workers": 9, "learners": 2}))
    with pytest.raises(ConfigError, match=r"cluster.reward_workers is 7, which ask for 7 CPUs, but of the cluster"):
        train_on_cluster(recipe(tmp_path, "many", {"reward_workers": 7}))
    assert not (tmp_path / "many").exists()


def test_workers_play_the_episodes_of_one_process(whole: Any, tmp_path: Path) -> None:
    """The environment is the driver's, the turns are those of four workers; trees, replies and figures are the same."""
    env = Path(__file__).parent.parent / "digits_env.py"
    played = {
        "env": {"type": "user", "env": f"{env}:Digits"}, "reward": {"type": "env"}, "sampling": {"max_new_tokens": 30},
        "explore": {"type": "deep", "num_rollouts": 4, "branches_per_pivot": 3, "segments": {"type": "turn"}},
    }  # fmt: skip

    def of(name: str, cluster: dict[str, Any] | None = None) -> Config:
        return parse_config({**recipe(tmp_path, name, cluster, steps=3).model_dump(), **played})

    one = train(of("one"))
    four = train_on_cluster(of("four", {"rollout_workers": 4, "learners": 1}))
    assert_same(four, one)
    assert counters(four) == {"rollout_workers": 4}
    assert trace(four)[-1]["ledger/given_tokens"] > 0
    for step in (1, 2, 3):
        a, b = (load_trees(each / "trees" / f"step-{step:06d}.jsonl.gz") for each in (one, four))
        assert [[n.replies for n in tree.nodes] for tree in a] == [[n.replies for n in tree.nodes] for tree in b]
