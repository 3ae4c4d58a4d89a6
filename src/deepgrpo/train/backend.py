"""Backends: the process or processes in which a run samples, scores and learns.

    Backend.prepare ──► device of the run's policy, before its weights are loaded
    Backend.open    ──► Parts: engine     samples       (engines/base.py)
                               learner    UpdatesPolicy
                               reward     scores        (rewards/base.py)

The training loop uses only `Parts` and does not depend on where they run. `LocalBackend` runs everything in one process;
`cluster/run.py` has the one for Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from deepgrpo.config import Config
from deepgrpo.engines.base import Engine
from deepgrpo.model.device import resolve_device
from deepgrpo.model.policy import Policy
from deepgrpo.prompts.tasks import Task
from deepgrpo.records import Credit, Tree
from deepgrpo.rewards import build_reward
from deepgrpo.rewards.base import Reward
from deepgrpo.train.build import SamplerBuilder, build_sampler
from deepgrpo.train.learner import Learner, Update
from deepgrpo.train.metrics import Metrics
from deepgrpo.train.optim import build_optimizer
from deepgrpo.train.room import check_room


class UpdatesPolicy(Protocol):
    """A learner. After each call that changes weights, the run's policy has them too."""

    optimizer_steps: int
    """Optimizer steps taken so far."""

    def adopt(self) -> None:
        """Reload weights from the run's policy after an external change."""

    def freeze_reference(self) -> None:
        """Adopt the policy's weights and, if the loss has a KL term, copy them as its reference."""

    def update(self, trees: Sequence[Tree], credits: Sequence[Credit]) -> Update:
        """Take the optimizer steps of a batch. Raises DivergenceError if a loss or a gradient is not finite."""

    def likelihood(self, trees: Sequence[Tree], credits: Sequence[Credit]) -> tuple[np.ndarray, int]:
        """Log-probs under the present weights, which stay as they are (`train.belief.Likelihood`)."""

    def save(self, directory: Path) -> None:
        """Write the optimizer's moments into a checkpoint."""

    def load(self, directory: Path, updates: int, optimizer_steps: int) -> None:
        """Adopt the policy's weights and read back the moments that `save` wrote.

        Args:
            updates: calls of `update` so far, one per run step; the learning rate follows them.
            optimizer_steps: optimizer steps so far.
        """


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a run that a backend opens, and its hooks into the loop.

    Example: Parts(engine, learner, reward) is a complete local backend.
    """

    engine: Engine
    learner: UpdatesPolicy
    reward: Reward
    """Scores the training batches."""
    overlaps: bool = False
    """True if the next batch is sampled during an update."""
    loses_learners: bool = False
    """True if a learner may be lost, after which the run resumes from its last checkpoint."""
    description: str | None = None
    """One line for the log."""
    begin_step: Callable[[], None] = lambda: None
    """Called before a batch or an evaluation is sampled: workers may be replaced, and the newest weights are used."""
    metrics: Callable[[], Metrics] = dict
    """Metrics of the backend itself, once per step."""
    listen: Callable[[Callable[[str], None]], None] = lambda note: None
    """Sets the function that logs the backend's events."""

    def close(self) -> None:
        """Close engine and reward. A backend with processes of its own ends them itself."""
        self.engine.close()
        self.reward.close()


class Backend(Protocol):
    """Opens the parts of a run. The caller closes them."""

    def prepare(self, config: Config, shapes: Policy | None) -> str:
        """Return the device of the run's policy, before its weights are loaded.

        Args:
            shapes: the policy without weights, None if its config alone does not determine it.

        Raises ModelError if the model cannot fit in memory.
        """

    def open(self, config: Config, policy: Policy, task: Task | None) -> Parts:
        """Start everything that samples, scores and learns.

        Args:
            policy: the run's policy.
            task: the data's own verifier, if it has one.
        """


class LocalBackend:
    """A backend that samples, scores and learns in this process, in turn.

    Args:
        sampler: builds the engine.
    """

    def __init__(self, sampler: SamplerBuilder = build_sampler) -> None:
        self.sampler = sampler

    def prepare(self, config: Config, shapes: Policy | None) -> str:
        """See `Backend.prepare`."""
        device = resolve_device(config.run.device)
        if shapes is not None:
            check_room(config, shapes, device)
        return device

    def open(self, config: Config, policy: Policy, task: Task | None) -> Parts:
        """See `Backend.open`."""
        reward = build_reward(config.reward, task)
        engine = self.sampler(config, policy)
        exact = engine.exact and config.sampling.of_the_policy
        learner = Learner(policy, None, build_optimizer(policy, config.optim), config, exact_sampler=exact)
        return Parts(engine, learner, reward)
