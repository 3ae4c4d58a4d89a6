"""The learner group: learners in several processes, as one learner for the loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deepgrpo.cluster.actors import LearnerRank
from deepgrpo.cluster.events import Events, LearnerLostError
from deepgrpo.cluster.failures import raise_actor_error
from deepgrpo.cluster.ready import Ready
from deepgrpo.cluster.session import Resources, ray_options
from deepgrpo.cluster.sharding import load_weights
from deepgrpo.cluster.weight_store import WeightStore
from deepgrpo.config import Config
from deepgrpo.errors import DeepGRPOError, EngineError
from deepgrpo.model.materialize import FrozenState
from deepgrpo.model.policy import Policy
from deepgrpo.progress import phase
from deepgrpo.records import Credit, Tree
from deepgrpo.train.learner import Update
from deepgrpo.train.moments import SHARDED, read_moments, save_moments

GRACE_S = 10.0
"""Seconds to wait for the report of a death, after other learners have lost their connection to the dead one."""


class LearnerGroup:
    """All learners of a cluster (`train.backend.UpdatesPolicy`). A group that has lost a learner cannot be used again."""

    def __init__(
        self, config: Config, policy: Policy, resources: Resources, store: WeightStore, events: Events, *,
        exact_sampler: bool,
    ) -> None:  # fmt: skip
        assert config.cluster is not None
        self.config, self.policy, self.cluster, self.store, self.events = config, policy, config.cluster, store, events
        self.optimizer_steps = 0
        self.ranks: list[Any] = []
        self.started = False
        # all or none, so that two runs on one cluster cannot each hold half of what they need; close together if possible
        bundle = {kind: count for kind, count in resources.learner.items() if count}
        self.placement: PlacementGroup | None = placement_group([bundle] * self.cluster.learners, strategy="PACK")
        if not self.placement.wait(self.cluster.start_deadline_s):
            self.close()
            raise EngineError(
                f"the cluster had no room for cluster.learners = {self.cluster.learners} within cluster.start_deadline_s = "
                f"{self.cluster.start_deadline_s:g} seconds; is another run on it? See `ray status`"
            )
        self.ranks = [
            ray.remote(LearnerRank)
            .options(
                **ray_options(resources.learner),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=rank),
            )
            .remote(config, resources.device, rank, exact_sampler)
            for rank in range(self.cluster.learners)
        ]
        self.ready: list[Ready] = self._wait([rank.ready.remote() for rank in self.ranks], self.cluster.start_deadline_s)
        (address,) = self._wait([self.ranks[0].address.remote()], self.cluster.start_deadline_s)
        self._wait([rank.join.remote(address) for rank in self.ranks], self.cluster.start_deadline_s)

    def adopt(self) -> None:
        """See `UpdatesPolicy.adopt`."""
        weights = self.store.put(self.policy)
        if self.started:
            self._call_all("adopt", weights)

    def freeze_reference(self) -> None:
        """See `UpdatesPolicy.freeze_reference`. Only now do the learners get weights: a warm start is the driver's work."""
        fixed = ray.put(FrozenState.of(self.policy)) if any(each.without_weights for each in self.ready) else None
        weights = self.store.put(self.policy)
        started = [rank.start.remote(weights, fixed) for rank in self.ranks]
        if any(self._wait(started, self.cluster.start_deadline_s)):
            self.events.note(
                "cluster: each learner had the whole model before it was sharded: its config alone does not determine it"
            )
        self.started = True

    def update(self, trees: Sequence[Tree], credits: Sequence[Credit]) -> Update:
        """See `UpdatesPolicy.update`."""
        batch = ray.put((trees, credits))
        answers = [rank.update.options(num_returns=2).remote(batch) for rank in self.ranks]
        with phase("learning"):
            (update, *_) = self._wait([update for update, _ in answers], self.cluster.update_deadline_s)
        assert isinstance(update, Update)
        if update.optimizer_steps:
            (weights,) = self._wait([answers[0][1]], self.cluster.update_deadline_s)
            load_weights(self.policy, weights)
            # a copy owned by the driver: the learner's would be lost with its node
            self.store.add(ray.put(weights))
        self.optimizer_steps += update.optimizer_steps
        self.policy.version = self.optimizer_steps
        return update

    def likelihood(self, trees: Sequence[Tree], credits: Sequence[Credit]) -> tuple[np.ndarray, int]:
        """See `UpdatesPolicy.likelihood`. The learners share the forward passes."""
        found, *_ = self._call_all("likelihood", ray.put((trees, credits)))
        values, forwarded = found
        return np.array(values), int(forwarded)

    def save(self, directory: Path) -> None:
        """See `UpdatesPolicy.save`."""
        if self.cluster.sharding == "fsdp":
            self._call_all("save_shards", str(directory.absolute()))
        else:
            (moments,) = self._wait([self.ranks[0].moments.remote()], self.cluster.update_deadline_s)
            save_moments(moments, directory)

    def load(self, directory: Path, updates: int, optimizer_steps: int) -> None:
        """See `UpdatesPolicy.load`."""
        by_shards = self.cluster.sharding == "fsdp" and (directory / SHARDED).is_dir()
        moments = None if by_shards else ray.put(read_moments(self.policy, directory))
        here = str(directory.absolute())
        self._call_all("resume", self.store.put(self.policy), moments, here, updates, optimizer_steps)
        self.policy.version = self.optimizer_steps = optimizer_steps

    def close(self) -> None:
        """End all learners."""
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []
        if self.placement is not None:
            remove_placement_group(self.placement)
            self.placement = None

    def _call_all(self, method: str, *arguments: Any) -> list[Any]:
        return self._wait(
            [getattr(rank, method).remote(*arguments) for rank in self.ranks], self.cluster.update_deadline_s
        )

    def _wait(self, references: Sequence[Any], deadline_s: float) -> list[Any]:
        """Return all answers.

        Raises LearnerLostError if a learner is lost or misses the deadline: the others would wait for it forever, and are
        ended. If a learner raises one of our errors, this raises the same.
        """
        until = time.monotonic() + deadline_s
        pending = list(references)
        failed: RayTaskError | None = None
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, until - time.monotonic()))
            if not done:
                break
            try:
                ray.get(done[0])
            except RayTaskError as error:
                if isinstance(error.cause, DeepGRPOError):
                    raise error.cause from None
                # most likely its connection to a dead learner: wait a little for the report of that death
                if failed is None:
                    failed, until = error, min(until, time.monotonic() + GRACE_S)
            except RayActorError as error:
                raise_actor_error(error)
                self._lost("has died")
            except RayError as error:
                self._lost(f"cannot be reached ({type(error).__name__})")
        if failed is not None:
            raise failed
        if pending:
            self.events.counts["deadline"] += 1
            self._lost(f"gave no answer within {deadline_s:g} seconds")
        try:
            return list(ray.get(list(references), timeout=GRACE_S))
        except (GetTimeoutError, RayError) as error:
            self._lost(f"cannot be reached ({type(error).__name__})")
            raise AssertionError("unreachable") from error

    def _lost(self, reason: str) -> None:
        self.close()
        text = f"a learner {reason}"
        if not hasattr(self, "ready"):
            raise EngineError(
                f"{text} before it was ready; look for the cause (memory? no room for it?) with `ray status` and in "
                "Ray's logs, and continue with --resume"
            )
        self.events.report_loss("learner_lost", f"{text}; the run comes back from its last checkpoint")
        raise LearnerLostError(text)
