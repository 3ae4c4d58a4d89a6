"""Rewards checked by processes of the cluster, instead of all on the driver's machine.

    score ─► rows cut in as many parts as there are workers ─► a Reward in each worker ─► scores, back in order
                             ▲                                    │ it dies, or does not answer in time
                             └────────── its part, again ◄────────┘ another takes its place
"""

from __future__ import annotations

from collections.abc import Sequence

import ray
from ray.exceptions import RayError, RayTaskError

from deepgrpo.cluster.actors import Hello
from deepgrpo.cluster.calls import Calls
from deepgrpo.cluster.events import Events
from deepgrpo.cluster.pool import raise_inside, raise_ours
from deepgrpo.config import Config
from deepgrpo.errors import EngineError
from deepgrpo.prompts.tasks import Task, build_task
from deepgrpo.records import Prompt, Score
from deepgrpo.rewards import build_reward
from deepgrpo.rewards.base import Reward, Voting
from deepgrpo.rewards.vote import loose_answer


class RewardWorker:
    """A reward of the recipe, in a process of its own."""

    def __init__(self, config: Config) -> None:
        self.reward = build_reward(config.reward, build_task(config.data))

    def hello(self) -> Hello:
        return Hello.of_this_process()

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        """See `rewards.base.Reward.score`."""
        return self.reward.score(prompts, completions, completion_ids)


class RewardPool:
    """See `rewards.base.Reward`. A user's function sees one part of a round's responses per call.

    Args:
        config: the recipe; `cluster.reward_workers` is at least 1.
        task: the verifier that the data brings along, if any.
    """

    def __init__(self, config: Config, task: Task | None, events: Events) -> None:
        assert config.cluster is not None
        self.cluster, self.events = config.cluster, events
        # says which answer a response gives, without checking it: too little work to send it away
        self._local: Reward = build_reward(config.reward, task)
        options = {"num_cpus": self.cluster.cpus_per_reward_worker, "max_restarts": 0}
        self._start = lambda: ray.remote(RewardWorker).options(**options).remote(config)
        self.workers = [self._start() for _ in range(self.cluster.reward_workers)]
        try:
            found: list[Hello] = ray.get([w.hello.remote() for w in self.workers], timeout=self.cluster.start_deadline_s)
        except (RayError, TimeoutError) as error:
            self.close()
            raise_ours(error)
            raise EngineError(
                f"cluster.reward_workers = {self.cluster.reward_workers} could not all be started ({type(error).__name__}); "
                "look at `ray status` and into Ray's logs"
            ) from error
        self.nodes = [hello.node for hello in found]
        """Where they were when they started."""

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        """See `rewards.base.Reward.score`."""
        found: dict[int, list[Score]] = {}
        calls: Calls[int] = Calls("cluster.reward_deadline_s", self.cluster.reward_deadline_s)
        count = len(self.workers)
        cuts = [len(prompts) * i // count for i in range(count + 1)]

        def send(number: int) -> None:
            part = slice(cuts[number], cuts[number + 1])
            calls.add(self.workers[number].score.remote(prompts[part], completions[part], completion_ids[part]), number)

        for number in range(count):
            if cuts[number] < cuts[number + 1]:
                send(number)
        for number, answer in calls:
            if isinstance(answer, RayTaskError):
                raise_inside(answer)
            if isinstance(answer, Exception):
                self._lose(number, calls.why(answer, self.events))
                send(number)
                continue
            found[number] = answer
        return [score for number in sorted(found) for score in found[number]]

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """See `rewards.base.Voting`."""
        return self._local.vote(prompt, completion) if isinstance(self._local, Voting) else loose_answer(completion)

    def close(self) -> None:
        """See `rewards.base.Reward.close`."""
        self._local.close()
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []

    def _lose(self, number: int, why: str) -> None:
        ray.kill(self.workers[number])
        # calls to it wait until it is there; Ray puts it wherever there is room
        self.workers[number] = self._start()
        self.events.lost("reward_worker_lost", f"reward worker {number} {why}; its responses are scored again")
