"""The learners as one: what the loop calls a learner."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deepgrpo.cluster.actors import Hello, LearnerRank
from deepgrpo.cluster.events import Events, LearnerLostError
from deepgrpo.cluster.pool import raise_ours
from deepgrpo.cluster.session import Needs, ray_options
from deepgrpo.cluster.sharding import take_weights
from deepgrpo.cluster.weight_store import WeightStore
from deepgrpo.config import Config
from deepgrpo.errors import DeepGRPOError, EngineError
from deepgrpo.model.materialize import FrozenState
from deepgrpo.model.policy import Policy
from deepgrpo.records import Credit, Tree
from deepgrpo.train.learner import Update
from deepgrpo.train.moments import SHARDED, read_moments, save_moments

GRACE_S = 10.0
"""Seconds in which a death is heard of, after the others have lost their connection to it."""


class LearnerGroup:
    """See `train.place.UpdatesPolicy`. A group that has lost one of its own is of no more use."""

    def __init__(
        self, config: Config, policy: Policy, needs: Needs, shelf: WeightStore, events: Events, *, exact_sampler: bool
    ) -> None:
        assert config.cluster is not None
        self.config, self.policy, self.cluster, self.shelf, self.events = config, policy, config.cluster, shelf, events
        self.optimizer_steps = 0
        self.ranks: list[Any] = []
        self.begun = False
        # all places or none, so that two runs on one cluster cannot hold half of what each needs; as near as there is room
        bundle = {kind: count for kind, count in needs.learner.items() if count}
        self.places: PlacementGroup | None = placement_group([bundle] * self.cluster.learners, strategy="PACK")
        if not self.places.wait(self.cluster.start_deadline_s):
            self.close()
            raise EngineError(
                f"the cluster had no room for cluster.learners = {self.cluster.learners} within cluster.start_deadline_s = "
                f"{self.cluster.start_deadline_s:g} seconds; is another run on it? See `ray status`"
            )
        self.ranks = [
            ray.remote(LearnerRank)
            .options(
                **ray_options(needs.learner),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.places, placement_group_bundle_index=rank),
            )
            .remote(config, needs.device, rank, exact_sampler)
            for rank in range(self.cluster.learners)
        ]
        self.hellos: list[Hello] = self._wait([rank.hello.remote() for rank in self.ranks], self.cluster.start_deadline_s)
        (address,) = self._wait([self.ranks[0].address.remote()], self.cluster.start_deadline_s)
        self._wait([rank.join.remote(address) for rank in self.ranks], self.cluster.start_deadline_s)

    def adopt(self) -> None:
        weights = self.shelf.put(self.policy)
        if self.begun:
            self._all("take", weights)

    def freeze_reference(self) -> None:
        # learners take the start weights over only now: a warm start before it is the driver's own
        fixed = ray.put(FrozenState.of(self.policy)) if any(hello.outlined for hello in self.hellos) else None
        weights = self.shelf.put(self.policy)
        begun = [rank.begin.remote(weights, fixed) for rank in self.ranks]
        if any(self._wait(begun, self.cluster.start_deadline_s)):
            self.events.note("cluster: each learner had the model whole before it was cut: its config alone does not build it")
        self.begun = True

    def update(self, trees: Sequence[Tree], credits: Sequence[Credit]) -> Update:
        batch = ray.put((trees, credits))
        answers = [rank.update.options(num_returns=2).remote(batch) for rank in self.ranks]
        (update, *_) = self._wait([told for told, _ in answers], self.cluster.update_deadline_s)
        assert isinstance(update, Update)
        if update.optimizer_steps:
            (found,) = self._wait([answers[0][1]], self.cluster.update_deadline_s)
            take_weights(self.policy, found)
            # the driver's own copy, on its node: that of a learner would be lost with its node
            self.shelf.lay(ray.put(found))
        self.optimizer_steps += update.optimizer_steps
        self.policy.version = self.optimizer_steps
        return update

    def save(self, directory: Path) -> None:
        if self.cluster.sharding == "fsdp":
            self._all("save_shards", str(directory.absolute()))
        else:
            (moments,) = self._wait([self.ranks[0].moments.remote()], self.cluster.update_deadline_s)
            save_moments(moments, directory)

    def load(self, directory: Path, optimizer_steps: int) -> None:
        by_shards = self.cluster.sharding == "fsdp" and (directory / SHARDED).is_dir()
        moments = None if by_shards else ray.put(read_moments(self.policy, directory))
        self._all("resume", self.shelf.put(self.policy), moments, str(directory.absolute()), optimizer_steps)
        self.policy.version = self.optimizer_steps = optimizer_steps

    def close(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []
        if self.places is not None:
            remove_placement_group(self.places)
            self.places = None

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._wait(
            [getattr(rank, method).remote(*arguments) for rank in self.ranks], self.cluster.update_deadline_s
        )

    def _wait(self, answers: Sequence[Any], deadline_s: float) -> list[Any]:
        """What all of them say.

        Raises LearnerLostError if one is gone or too late: the rest wait for it in vain, and are ended. An error of ours that
        one raises, all raise.
        """
        until = time.monotonic() + deadline_s
        waiting = list(answers)
        failed: RayTaskError | None = None
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, until - time.monotonic()))
            if not done:
                break
            try:
                ray.get(done[0])
            except RayTaskError as error:
                if isinstance(error.cause, DeepGRPOError):
                    raise error.cause from None
                # most likely the connection to one that has died: wait a little for the news
                if failed is None:
                    failed, until = error, min(until, time.monotonic() + GRACE_S)
            except RayActorError as error:
                raise_ours(error)
                self._lost("has died")
            except RayError as error:
                self._lost(f"cannot be reached ({type(error).__name__})")
        if failed is not None:
            raise failed
        if waiting:
            self.events.counts["deadline"] += 1
            self._lost(f"gave no answer within {deadline_s:g} seconds")
        try:
            return list(ray.get(list(answers), timeout=GRACE_S))
        except (GetTimeoutError, RayError) as error:
            self._lost(f"cannot be reached ({type(error).__name__})")
            raise AssertionError("unreachable") from error

    def _lost(self, why: str) -> None:
        self.close()
        text = f"a learner {why}"
        if not hasattr(self, "hellos"):
            raise EngineError(
                f"{text} before it was ready; look for the cause (memory? no room for it?) with `ray status` and in "
                "Ray's logs, and continue with --resume"
            )
        self.events.lost("learner_lost", f"{text}; the run comes back from its last checkpoint")
        raise LearnerLostError(text)
