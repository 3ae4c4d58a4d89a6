"""What is said when Ray is missing, old or does not answer; who samples what; when a run gives up. No Ray is started."""

from __future__ import annotations

import socket
import sys
from typing import Any

import pytest

from deepgrpo.cluster.events import Events
from deepgrpo.cluster.routing import RequestShare, RolloutIndex, assign_requests
from deepgrpo.cluster.run import train_on_cluster
from deepgrpo.cluster.session import check_version
from deepgrpo.errors import ConfigError, EngineError, MissingExtraError
from deepgrpo.records import Completion, SampleRequest
from deepgrpo.train.loop import train


def test_without_ray_the_command_to_install_it_is_given(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r'run: pip install "deepgrpo\[cluster\]"'):
        train_on_cluster(recipe(cluster={}))


@pytest.mark.parametrize("version", ["2.51.0", "1.13.0", "3.0.0"])
def test_a_version_out_of_range_is_refused(version: str) -> None:
    with pytest.raises(ConfigError, match=rf'the installed Ray is {version}.*needs 2.52 or later, below 3.0; run: pip install'):
        check_version(version)


def test_versions_in_range() -> None:
    for version in ("2.52.0", "2.60.0", "2.100.1rc1"):
        check_version(version)


def test_an_address_that_does_not_answer(recipe: Any) -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"cluster.address is '{address}', but nothing answers there .*; start one there"):
        train_on_cluster(recipe(cluster={"address": address}))


@pytest.mark.parametrize("address", ["ray://host:10001", "host", "host:port"])
def test_an_address_of_another_form(recipe: Any, address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=f"cluster.address is '{address}'; write HOST:PORT"):
        train_on_cluster(recipe(cluster={"address": address}))


def test_one_process_refuses_a_recipe_for_many(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"the recipe has a section \[cluster\], and this run stays in one process"):
        train(recipe(cluster={"learners": 2}))


def test_no_two_learners_share_a_gpu(recipe: Any) -> None:
    """NCCL refuses two ranks on one GPU; Ray fills a GPU with all that fits."""
    shared = {"learners": 2, "gpus_per_learner": 0.5, "gpus_per_worker": 0.5}
    with pytest.raises(ConfigError, match=r"cluster.gpus_per_learner is 0.5, so two of cluster.learners = 2 may get the"):
        recipe(run={"device": "cuda"}, cluster=shared)
    recipe(run={"device": "cuda"}, cluster={**shared, "gpus_per_learner": 0.6, "gpus_per_worker": 0.4})
    recipe(run={"device": "cuda"}, cluster={**shared, "learners": 1})
    recipe(run={"device": "cpu"}, cluster=shared)


def test_overlap_needs_importance_weights(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r'cluster.overlap is on and loss.importance is "off"'):
        recipe(cluster={"overlap": True}, loss={"importance": "off"})
    attention = {"type": "attnrl"}
    with pytest.raises(ConfigError, match=r'cluster.overlap is on, but explore.type = "attnrl" asks the policy'):
        recipe(cluster={"overlap": True}, explore=attention)


# ---------------------------------------------------------------- routing


def request(prefix: tuple[int, ...], count: int, tokens: int = 10) -> SampleRequest:
    return SampleRequest(prefix, tuple(range(count)), tokens)


def test_requests_are_spread_by_their_tokens() -> None:
    """Costs 40, 80, 20, 40 in two shares of 90: the largest first, 80 | 40, then 80 | 80, then 100 | 80."""
    requests = [request((1,), 4), request((2,), 8), request((3,), 2), request((4,), 4)]
    shares = assign_requests(requests, [0, 1], RolloutIndex())
    assert {w: [part.request for part in share] for w, share in shares.items()} == {0: [1, 2], 1: [0, 3]}


def test_a_single_large_request_is_split() -> None:
    shares = assign_requests([request((1,), 7)], [3, 5], RolloutIndex())
    assert shares == {3: [RequestShare(0, (0, 1, 2, 3))], 5: [RequestShare(0, (4, 5, 6))]}


def test_branches_go_to_who_has_their_rollout() -> None:
    rollouts = RolloutIndex()
    for worker, prompt in ((0, (1, 2)), (1, (3,))):
        rollouts.add(prompt, [Completion((7, 8, 9), (0.0,) * 3, "stop"), Completion((6, 5, 4), (0.0,) * 3, "stop")], worker)
    branches = [request((3, 7, 8), 2), request((1, 2, 6), 2), request((3, 6, 5), 1), request((1, 2, 7, 8), 1)]
    shares = assign_requests(branches, [0, 1], rollouts)
    assert {w: sorted(part.request for part in share) for w, share in shares.items()} == {0: [1, 3], 1: [0, 2]}
    # a worker does not drown in its own: of six branches it takes 1.5 times its fair share of three, rounded down
    shares = assign_requests([request((3, 7), 1)] * 6, [0, 1], rollouts)
    assert {w: len(share) for w, share in shares.items()} == {0: 2, 1: 4}
    rollouts.forget(1)
    assert rollouts.find(request((3, 7), 1)) is None and rollouts.find(request((1, 2, 7), 1)) == 0


def test_a_run_gives_up_when_losses_are_a_habit() -> None:
    events = Events(max_in_a_row=2)
    for _ in range(3):
        events.report_loss("worker_lost", "rollout worker 0 has died")
        events.report_loss("learner_lost", "a learner has died")
        events.step_done()
    events.report_loss("worker_lost", "a")
    events.report_loss("worker_lost", "b")
    with pytest.raises(EngineError, match="3 processes of the cluster were lost without a step between them"):
        events.report_loss("worker_lost", "c")
    assert events.counts["worker_lost"] == 6
