"""Whole runs on a real Ray: the numbers of one process, whatever dies on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402
from ray_workers import KILL, SETUP, RayWorkers  # noqa: E402

from deepgrpo.cluster.learners import LearnerGroup  # noqa: E402
from deepgrpo.cluster.pool import WorkerPool  # noqa: E402
from deepgrpo.cluster.ready import Ready  # noqa: E402
from deepgrpo.cluster.rewards import RewardPool  # noqa: E402
from deepgrpo.cluster.routing import RolloutIndex  # noqa: E402
from deepgrpo.cluster.run import RayBackend, train_on_cluster  # noqa: E402
from deepgrpo.cluster.session import require_ray  # noqa: E402
from deepgrpo.config import Config, load_recipe, parse_config, to_toml  # noqa: E402
from deepgrpo.errors import ConfigError  # noqa: E402
from deepgrpo.runs.trees import load_trees  # noqa: E402
from deepgrpo.train.loop import train  # noqa: E402

# eps is large enough that AdamW does not turn the rounding of a gradient near zero into a whole step
RECIPE: dict[str, Any] = {
    "run": {"steps": 3, "prompts_per_step": 4, "device": "cpu"},
    "model": {
        "type": "scratch", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_position": 96
    },
    "warmstart": {"steps": 40, "batch_size": 16, "lr": 1e-2},
    "data": {"type": "synthetic", "chain_length": 1},
    "reward": {"type": "task"},
    "sampling": {"max_new_tokens": 12},
    "explore": {
        "type": "deep", "num_rollouts": 4, "branches_per_pivot": 3, "segments": {"type": "tokens", "size": 3},
        "recoverability": {"window": 20, "min_items": 4},
    },
    "loss": {"beta": 0.01},
    "optim": {"lr": 1e-3, "eps": 1e-4},
    "learner": {"tokens_per_pack": 100},
    "eval": {"every": 2, "limit": 8, "data": {"type": "synthetic", "chain_length": 1, "split": "test"}},
    "checkpoint": {"every": 1},
    "log": {"trees_every": 1},
}  # fmt: skip
TWO = {"rollout_workers": 2, "learners": 2}
NODE: dict[str, Any] = {"num_cpus": 2, "setup_worker_path": SETUP}


def recipe(directory: Path, name: str, cluster: dict[str, Any] | None = None, steps: int = 3) -> Config:
    run = {**RECIPE["run"], "dir": str(directory), "name": name, "steps": steps}
    # on a machine that has other things to do, loading the model may take a while
    section = {"cluster": {"start_deadline_s": 3000, **cluster}} if cluster else {}
    return parse_config({**RECIPE, "run": run, **section})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others are compared with: one process, undisturbed."""
    return train(recipe(tmp_path_factory.mktemp("alone"), "alone"))


@pytest.fixture(scope="module")
def forks() -> RayWorkers:
    return RayWorkers()


@pytest.fixture(scope="module")
def two_nodes(forks: RayWorkers) -> Iterator[Any]:
    """A cluster of two nodes with three and two CPUs, on this machine."""
    require_ray()
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 3, "include_dashboard": False})
    cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def pools(two_nodes: Any) -> Iterator[list[WorkerPool]]:
    """The rollout workers that undisturbed runs share: two of them, as loading torch is most of what a run here costs."""
    running: list[WorkerPool] = []
    yield running
    for pool in running:
        pool.stop()


@pytest.fixture
def shared(two_nodes: Any, pools: list[WorkerPool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs find rollout workers of the runs before them, and leave them running."""
    start = RayBackend.open_pool

    def open_pool(self: RayBackend, policy: Any) -> WorkerPool:
        if not pools:
            pools.append(start(self, policy))
        pool = self.pool = pools[0]
        # numbers of weights go on: a worker loads those whose number it has not seen
        self.store._serial = pool.store._serial
        pool.store, pool.events, pool.cluster, pool.rollouts = self.store, self.events, self.cluster, RolloutIndex()
        self.store.put(policy)
        return pool

    monkeypatch.setattr(RayBackend, "open_pool", open_pool)
    monkeypatch.setattr(WorkerPool, "stop", lambda self: None)


@pytest.fixture
def whole(two_nodes: Any, pools: list[WorkerPool]) -> Any:
    """The cluster with no worker of another run, for tests in which workers end."""
    while pools:
        pools.pop().stop()
    return two_nodes


def trace(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured, and without what the cluster says of itself."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = ("time/", "ledger/seconds_", "tokens_per_s", "cluster/", "ledger/prefix_tokens_encoded", "prefix/", "branch/prefix_")
    return [{key: value for key, value in line.items() if not key.startswith(own)} for line in lines]


def assert_same(run: Path, alone: Path) -> None:
    """Every figure up to rounding; tokens and pivots exactly."""
    ours, theirs = trace(run), trace(alone)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [0, 1, 2, 3]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            if isinstance(value, float):
                assert one[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    for step in (1, 2, 3):
        a, b = (load_trees(each / "trees" / f"step-{step:06d}.jsonl.gz") for each in (run, alone))
        assert [tree.pivots for tree in a] == [tree.pivots for tree in b]
        assert [[n.tokens for n in tree.nodes] for tree in a] == [[n.tokens for n in tree.nodes] for tree in b]
    assert sum(line.get("pivots/count", 0) for line in ours) > 5 and any(line.get("branch/loss") for line in ours)


def counters(run: Path) -> dict[str, float]:
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {key.removeprefix("cluster/"): value for key, value in last.items() if key.startswith("cluster/") and value}


# ---------------------------------------------------------------- undisturbed


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


# ---------------------------------------------------------------- faults


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str, when: Callable[[Any], bool], act: Any) -> None:
    """Before the first call of a method for which `when` holds, do something to the processes behind it."""
    original, done = getattr(owner, method), []

    def wrapped(self: Any, *arguments: Any, **options: Any) -> Any:
        if not done and when(self):
            done.append(1)
            act(self)
        return original(self, *arguments, **options)

    monkeypatch.setattr(owner, method, wrapped)


def stop_then_kill(process: Ready, seconds: float = 0.5) -> None:
    """Stop a process now, so that it cannot finish what it is about to get, and kill it in the middle of that."""
    os.kill(process.pid, signal.SIGSTOP)
    threading.Timer(seconds, os.kill, (process.pid, signal.SIGKILL)).start()


def test_reward_workers_are_killed_and_stuck_while_a_batch_grows(
    shared: None, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One reward worker dies in step 1, the other answers nothing from step 2 on."""
    pids: list[int] = []

    def disturb(pool: RewardPool) -> None:
        pids.extend(ray.get(worker.ready.remote()).pid for worker in pool.workers)
        os.kill(pids[0], signal.SIGKILL)

    once(monkeypatch, RewardPool, "score", lambda pool: True, disturb)
    once(
        monkeypatch, LearnerGroup, "update", lambda group: group.optimizer_steps == 1,
        lambda group: os.kill(pids[1], signal.SIGSTOP),
    )  # fmt: skip
    cluster = {"rollout_workers": 2, "learners": 1, "reward_workers": 2, "reward_deadline_s": 15}
    run = train_on_cluster(recipe(tmp_path, "rewards", cluster))
    assert_same(run, alone)
    assert counters(run) == {"rollout_workers": 2, "reward_worker_lost": 2, "deadline": 1}
    text = (run / "log.txt").read_text()
    assert "1 learners (ddp, gloo), threads: 1 per rollout worker, 1 per learner, 2 reward workers" in text
    assert "reward worker 0 has died; its responses are scored again" in text
    assert "reward worker 1 gave no answer within cluster.reward_deadline_s = 15; its responses are scored again" in text


def test_a_rollout_worker_and_a_learner_are_killed(
    whole: Any, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker in the sampling of step 1; the learner in the update of step 2, from which the run goes back to step 1."""
    once(
        monkeypatch, WorkerPool, "sample", lambda pool: pool.events.counts["worker_lost"] == 0 and pool.learner_nodes != [],
        lambda pool: stop_then_kill(pool.workers[1].ready),
    )  # fmt: skip
    once(
        monkeypatch, LearnerGroup, "update", lambda group: group.optimizer_steps == 1,
        lambda group: stop_then_kill(group.ready[1]),
    )  # fmt: skip
    run = train_on_cluster(recipe(tmp_path, "killed", TWO))
    assert_same(run, alone)
    found = counters(run)
    assert found.pop("resampled_requests") >= 1
    assert found == {"rollout_workers": 2, "worker_lost": 1, "worker_started": 1, "learner_lost": 1}
    text = (run / "log.txt").read_text()
    assert "rollout worker 1 has died; its requests are sampled again" in text
    assert "a learner has died; the run comes back from its last checkpoint" in text


def test_a_stuck_worker_is_replaced_and_nodes_come_and_go(
    whole: Any, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that answers nothing for 10 seconds in step 1; before step 2 its node leaves, before step 3 another joins."""
    steps: list[int] = []
    original = RayBackend.begin_step

    def begin_step(self: RayBackend) -> None:
        assert self.pool is not None and self.group is not None
        steps.append(1)
        if len(steps) == 1:
            os.kill(next(iter(self.pool.workers.values())).ready.pid, signal.SIGSTOP)
        if len(steps) == 2:
            for node in list(whole.worker_nodes):
                whole.remove_node(node)
        if len(steps) == 3:
            assert len(self.pool.workers) == 1
            whole.add_node(**NODE)
        whole.wait_for_nodes()
        original(self)

    monkeypatch.setattr(RayBackend, "begin_step", begin_step)
    # two CPUs for each worker leave room for the learner only on the node that stays
    cluster = {"rollout_workers": 2, "learners": 1, "cpus_per_worker": 2, "sample_deadline_s": 10}
    run = train_on_cluster(recipe(tmp_path, "nodes", cluster))
    assert_same(run, alone)
    found = counters(run)
    assert {k: v for k, v in found.items() if k != "resampled_requests"} == {
        "rollout_workers": 2, "worker_lost": 2, "worker_started": 2, "deadline": 1, "node_left": 1, "node_joined": 1
    }  # fmt: skip
    assert "gave no answer within cluster.sample_deadline_s = 10" in (run / "log.txt").read_text()


RESUME = """
import os, sys
import psutil
from deepgrpo import cli
from deepgrpo.cluster.run import RayBackend

begin_step = RayBackend.begin_step

def look_first(self):
    begin_step(self)
    me = psutil.Process()
    print("listening:", sorted({
        each.laddr.ip.removeprefix("::ffff:") for process in [me, *me.children(recursive=True)]
        for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN
    }), os.environ["RAY_AUTH_MODE"])

RayBackend.begin_step = look_first
sys.exit(cli.main(["train", "--resume", sys.argv[1]]))
"""


def test_the_driver_is_killed_while_it_saves(forks: RayWorkers, alone: Path, tmp_path: Path) -> None:
    """Everything of the second checkpoint is written, and nothing renamed; `--resume` starts a Ray of its own.

    Every process of the resumed run is an interpreter of its own, as in use, and without what the tests tell Ray of addresses:
    all of them listen on loopback only, and ask for Ray's token.
    """
    run = tmp_path / "driver"
    (tmp_path / "recipe.toml").write_text(to_toml(recipe(tmp_path, "driver", {"rollout_workers": 1, "learners": 1})))
    dead = forks.run("train", "recipe.toml", cwd=tmp_path, timeout=1500, **{KILL: ".tmp-step-000002"})
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        ".tmp-step-000002", "step-000000", "step-000001"
    ]  # fmt: skip
    kept = ("RAY_worker_niceness", "RAY_raylet_start_wait_time_s")
    environ = {name: value for name, value in os.environ.items() if name in kept or not name.startswith("RAY_")}
    again = subprocess.run(
        [sys.executable, "-c", RESUME, str(run)], timeout=1500, check=False, capture_output=True, text=True, env=environ
    )
    assert again.returncode == 0, again.stderr
    assert_same(run, alone)
    assert not again.stderr
    assert again.stdout.count("listening: ['127.0.0.1'] token\n") == again.stdout.count("listening:") == 2  # steps 2 and 3


# ---------------------------------------------------------------- what a user may get wrong


def test_a_cluster_that_is_too_small_is_refused(two_nodes: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster.learners is 9, and each asks for 1 CPU, but the cluster has \d; lower it"):
        train_on_cluster(recipe(tmp_path, "many", {"learners": 9}))
    with pytest.raises(ConfigError, match=r"together ask for 11 CPUs, but the cluster has \d; lower one of them"):
        train_on_cluster(recipe(tmp_path, "many", {"rollout_workers": 9, "learners": 2}))
    with pytest.raises(ConfigError, match=r"cluster.reward_workers is 7, which ask for 7 CPUs, but of the cluster"):
        train_on_cluster(recipe(tmp_path, "many", {"reward_workers": 7}))
    assert not (tmp_path / "many").exists()
