"""Where the weights lie that rollout workers sample with: in Ray's object store, put there once per step."""

from __future__ import annotations

from typing import Any

import ray

from deepgrpo.cluster.sharding import whole_weights
from deepgrpo.model.policy import Policy


class WeightStore:
    """The newest weights, and those that are in use.

    Args:
        holds: whether new weights are taken into use by `renew` only, as a batch that is being sampled must not get other
            weights half-way.
    """

    def __init__(self, holds: bool) -> None:
        self.holds, self._serial = holds, 0
        self.newest: tuple[Any, int] = (None, 0)
        self.current: tuple[Any, int] = (None, 0)

    def put(self, policy: Policy) -> Any:
        """The policy's weights, in use at once. Returns the reference."""
        reference = ray.put(whole_weights(policy, keep=True))
        self.lay(reference)
        self.renew()
        return reference

    def lay(self, reference: Any) -> None:
        """Weights that are in the store already."""
        self._serial += 1
        self.newest = reference, self._serial
        if not self.holds:
            self.renew()

    def renew(self) -> None:
        self.current = self.newest
