"""The weights that rollout workers sample with, in Ray's object store."""

from __future__ import annotations

from typing import Any

import ray

from deepgrpo.cluster.sharding import gather_weights
from deepgrpo.model.policy import Policy


class WeightStore:
    """The newest weights, and those in use, each as (Ray reference, serial number).

    Args:
        hold: use new weights only after `use_newest`, so that a batch in progress keeps its weights.
    """

    def __init__(self, hold: bool) -> None:
        self.hold, self._serial = hold, 0
        self.newest: tuple[Any, int] = (None, 0)
        self.current: tuple[Any, int] = (None, 0)

    def put(self, policy: Policy) -> Any:
        """Store the policy's weights and use them at once. Returns their reference."""
        reference = ray.put(gather_weights(policy, keep=True))
        self.add(reference)
        self.use_newest()
        return reference

    def add(self, reference: Any) -> None:
        """Register weights that are in the object store already."""
        self._serial += 1
        self.newest = reference, self._serial
        if not self.hold:
            self.use_newest()

    def use_newest(self) -> None:
        self.current = self.newest
