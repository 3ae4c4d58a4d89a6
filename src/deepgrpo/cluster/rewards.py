"""Reward workers: processes of the cluster that check responses instead of the driver.

    score ─► responses split evenly over the workers ─► a Reward in each worker ─► scores, in order
                             ▲                                    │ it dies or misses the deadline
                             └────────── its part, again ◄────────┘ a new worker replaces it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import ray
from ray.exceptions import RayError, RayTaskError

from deepgrpo.cluster.calls import Calls
from deepgrpo.cluster.events import Events
from deepgrpo.cluster.failures import raise_actor_error, raise_task_error
from deepgrpo.cluster.ready import Ready
from deepgrpo.config import Config
from deepgrpo.errors import ConfigError, EngineError, first_line
from deepgrpo.feedback import Score
from deepgrpo.prompts.tasks import Task, build_task
from deepgrpo.records import Prompt
from deepgrpo.rewards import build_reward
from deepgrpo.rewards.base import Reward, Voting, metrics_of, truncated_score
from deepgrpo.rewards.vote import loose_answer


class RewardWorker:
    """A Ray actor with the recipe's reward, and its share of the limits of a judge."""

    def __init__(self, config: Config) -> None:
        assert config.cluster is not None
        self.reward = build_reward(config.reward.share(config.cluster.reward_workers), build_task(config.data))

    def ready(self) -> Ready:
        return Ready.of_this_process()

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> tuple[list[Score], dict[str, float]]:
        """Scores (see `rewards.base.Reward.score`), and metrics of the reward since the last call."""
        return self.reward.score(prompts, completions, completion_ids), metrics_of([self.reward])


def _require_picklable(config: Config) -> None:
    """Raise ConfigError if a function that the recipe holds cannot be sent to another process."""
    try:
        ray.cloudpickle.dumps(config.reward)
    except Exception as error:  # pickling runs the user's code
        raise ConfigError(
            f"rewards: {type(error).__name__}: {first_line(error)}: a function that cannot be pickled does not reach "
            "cluster.reward_workers; set cluster.reward_workers = 0, or write the function into a file and name it: "
            'reward.function = "FILE.py:NAME"'
        ) from error


class RewardPool:
    """Reward workers behind the `rewards.base.Reward` protocol.

    A user's function gets a part of a round's responses per call.

    Args:
        config: the recipe; `cluster.reward_workers` is at least 1.
        task: the data's own verifier, if it has one.
    """

    def __init__(self, config: Config, task: Task | None, events: Events) -> None:
        assert config.cluster is not None
        self.cluster, self.events = config.cluster, events
        # extracts answers for maj@k without checking them: too little work to send away
        self._local: Reward = build_reward(config.reward, task)
        _require_picklable(config)
        self._metrics: Counter[str] = Counter()
        options = {"num_cpus": self.cluster.cpus_per_reward_worker, "max_restarts": 0}
        self._start = lambda: ray.remote(RewardWorker).options(**options).remote(config)
        self.workers = [self._start() for _ in range(self.cluster.reward_workers)]
        try:
            ready: list[Ready] = ray.get([w.ready.remote() for w in self.workers], timeout=self.cluster.start_deadline_s)
        except (RayError, TimeoutError) as error:
            self.close()
            raise_actor_error(error)
            raise EngineError(
                f"cluster.reward_workers = {self.cluster.reward_workers} could not all be started ({type(error).__name__}); "
                "look at `ray status` and into Ray's logs"
            ) from error
        self.nodes = [each.node for each in ready]
        """Nodes of the workers when they started."""

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        """See `rewards.base.Reward.score`."""
        scores: dict[int, list[Score]] = {}
        calls: Calls[int] = Calls("cluster.reward_deadline_s", self.cluster.reward_deadline_s)
        count = len(self.workers)
        bounds = [len(prompts) * i // count for i in range(count + 1)]

        def send(number: int) -> None:
            part = slice(bounds[number], bounds[number + 1])
            calls.add(self.workers[number].score.remote(prompts[part], completions[part], completion_ids[part]), number)

        for number in range(count):
            if bounds[number] < bounds[number + 1]:
                send(number)
        for number, answer in calls:
            if isinstance(answer, RayTaskError):
                raise_task_error(answer)
            if isinstance(answer, Exception):
                self._replace(number, calls.reason(answer, self.events))
                send(number)
                continue
            scores[number], metrics = answer
            self._metrics.update(metrics)
        return [score for number in sorted(scores) for score in scores[number]]

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """See `rewards.base.Voting`."""
        return self._local.vote(prompt, completion) if isinstance(self._local, Voting) else loose_answer(completion)

    def take_metrics(self) -> dict[str, float]:
        """See `rewards.base.Measured`."""
        taken, self._metrics = self._metrics, Counter()
        return dict(taken)

    def truncated(self, value: float) -> Score:
        """See `rewards.base.Composite`."""
        return truncated_score(self._local, value)

    def close(self) -> None:
        """See `rewards.base.Reward.close`."""
        self._local.close()
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []

    def _replace(self, number: int, reason: str) -> None:
        ray.kill(self.workers[number])
        # calls wait until the new actor is up; Ray places it wherever there is room
        self.workers[number] = self._start()
        self.events.report_loss("reward_worker_lost", f"reward worker {number} {reason}; its responses are scored again")
