"""Where a run samples and learns: in its own process, or anywhere else that can do the same.

    Place ──► engine    samples       (engines/base.py)
          ──► learner   UpdatesPolicy

The loop talks to these two and never learns where they are. `OneProcess` is the place that is always there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from deepgrpo.config import Config
from deepgrpo.engines.base import Engine
from deepgrpo.model.device import resolve_device
from deepgrpo.model.policy import Policy
from deepgrpo.prompts.tasks import Task
from deepgrpo.records import Credit, Tree
from deepgrpo.rewards import build_reward
from deepgrpo.rewards.base import Reward
from deepgrpo.train.engine import build_engine
from deepgrpo.train.learner import Learner, Update
from deepgrpo.train.memory import check_room
from deepgrpo.train.metrics import Metrics
from deepgrpo.train.optim import build_optimizer


class UpdatesPolicy(Protocol):
    """What learns. After each call that changes weights, the run's policy has them too."""

    optimizer_steps: int
    """Steps behind the weights."""

    def adopt(self) -> None:
        """Go on from the weights that the run's policy has now: somebody else has changed them."""
        ...

    def freeze_reference(self) -> None:
        """Adopt the policy's weights, and take them as the start model of the KL term, if there is one."""
        ...

    def update(self, trees: Sequence[Tree], credits: Sequence[Credit]) -> Update:
        """Take the optimizer steps of a batch. Raises TrainingError if a loss or a gradient is not finite."""
        ...

    def save(self, directory: Path) -> None:
        """Write what the optimizer remembers into a checkpoint."""
        ...

    def load(self, directory: Path, optimizer_steps: int) -> None:
        """Adopt the policy's weights, and read back what `save` wrote."""
        ...


class Place(Protocol):
    """Hands out engine and learner, and tells how they fare."""

    overlaps: bool
    """Whether the next batch is sampled while the learner works on this one."""
    waves: int
    """In how many waves a batch grows (explore/waves.py)."""
    loses: bool
    """Whether it may lose a learner, and the run then comes back from its last checkpoint."""

    def device(self, config: Config) -> str:
        """Device of the run's own policy, as in `run.device`."""
        ...

    def check_room(self, config: Config, outline: Policy) -> None:
        """Raise ModelError if the model cannot fit, before any of it is loaded; `outline` has shapes and no weights."""
        ...

    def engine(self, config: Config, policy: Policy) -> Engine: ...

    def reward(self, config: Config, task: Task | None) -> Reward:
        """The reward of the training batches."""
        ...

    def learner(self, config: Config, policy: Policy, *, exact_sampler: bool) -> UpdatesPolicy: ...

    def listen(self, note: Callable[[str], None]) -> None:
        """From now on, tell each event as a line."""
        ...

    def begin_step(self) -> None:
        """Sampling begins: nothing is under way, so parts may come and go, and the newest weights are taken into use."""
        ...

    def metrics(self) -> Metrics: ...

    def describe(self) -> str | None:
        """Itself in a line; None if there is nothing to say."""
        ...


class OneProcess:
    """The process of the run does everything, one thing after the other."""

    overlaps = loses = False
    waves = 1

    def device(self, config: Config) -> str:
        return config.run.device

    def check_room(self, config: Config, outline: Policy) -> None:
        check_room(config, outline, resolve_device(config.run.device))

    def engine(self, config: Config, policy: Policy) -> Engine:
        return build_engine(config, policy)

    def reward(self, config: Config, task: Task | None) -> Reward:
        return build_reward(config.reward, task)

    def learner(self, config: Config, policy: Policy, *, exact_sampler: bool) -> UpdatesPolicy:
        return Learner(policy, None, build_optimizer(policy, config.optim), config, exact_sampler=exact_sampler)

    def listen(self, note: Callable[[str], None]) -> None:
        pass

    def begin_step(self) -> None:
        pass

    def metrics(self) -> Metrics:
        return {}

    def describe(self) -> str | None:
        return None
