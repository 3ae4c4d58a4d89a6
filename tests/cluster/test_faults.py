"""Whole runs on a real Ray in which processes die, hang, come and go: the numbers of one process all the same."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from cluster_runs import NODE, TWO, assert_same, counters, recipe  # noqa: E402
from deepgrpo.cluster.learners import LearnerGroup  # noqa: E402
from deepgrpo.cluster.pool import WorkerPool  # noqa: E402
from deepgrpo.cluster.ready import Ready  # noqa: E402
from deepgrpo.cluster.rewards import RewardPool  # noqa: E402
from deepgrpo.cluster.run import RayBackend, train_on_cluster  # noqa: E402


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
