"""The first answer of an actor. No torch: reward workers need none"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import ray

if TYPE_CHECKING:
    from deepgrpo.engines.base import Engine


@dataclass(frozen=True, slots=True)
class Ready:
    """The first answer of an actor, once it can take weights."""

    pid: int
    node: str
    """Ray's node id."""
    threads: int = 1
    """CPU threads of torch."""
    exact: bool = True
    """`exact` of a rollout worker's engine."""
    remark: str | None = None
    """`remark` of a rollout worker's engine."""
    without_weights: bool = False
    """True if a learner's model has no weights yet, so that it needs all of them."""

    @classmethod
    def of_this_process(cls, threads: int = 1, engine: Engine | None = None) -> Ready:
        node = str(ray.get_runtime_context().get_node_id())
        ready = cls(os.getpid(), node, threads)
        return ready if engine is None else replace(ready, exact=engine.exact, remark=engine.remark)
