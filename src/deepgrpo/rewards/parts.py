"""Several rewards with weights: a response's reward is the weighted sum of its parts.

    prompts, responses ─► part 1 ─► value · weight ┐
                      ├─► part 2 ─► value · weight ┼─► Score(value = Σ, parts, outcome = value of the part `success`)
                      └─► ...                      ┘

Parts are asked one after another, each with all responses of the round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from deepgrpo.config import WeightedReward as WeightedConfig
from deepgrpo.config.problems import in_place
from deepgrpo.errors import DeepGRPOError
from deepgrpo.feedback import PartScore, Score
from deepgrpo.records import Prompt
from deepgrpo.rewards.base import NeedsColumns, Reward, Verifier, Voting, metrics_of
from deepgrpo.rewards.returned import LARGEST
from deepgrpo.rewards.vote import loose_answer


@contextmanager
def _in_part(name: str) -> Iterator[None]:
    """Have errors name the keys of a part."""
    try:
        yield
    except DeepGRPOError as error:
        error.args = (in_place(str(error), f"reward.parts.{name}"),)
        raise


class WeightedReward:
    """The weighted sum of several rewards."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float], success: str | None) -> None:
        """Combine rewards.

        Args:
            rewards: name → reward.
            weights: of each.
            success: the part that says success; None: the sum.
        """
        self._rewards, self._weights, self._success = dict(rewards), dict(weights), success

    @classmethod
    def build(cls, config: WeightedConfig, task: Verifier | None) -> WeightedReward:
        from deepgrpo.rewards import build_reward  # which knows this module

        rewards = {}
        for name, part in config.parts.items():
            with _in_part(name):
                rewards[name] = build_reward(part, task)
        return cls(rewards, {name: part.weight for name, part in config.parts.items()}, config.success_part)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        """See `Reward.score`. Raises RewardError if a part cannot score."""
        found = {}
        for name, reward in self._rewards.items():
            with _in_part(name):
                found[name] = reward.score(prompts, completions, completion_ids)
        return [self._sum({name: scores[i] for name, scores in found.items()}) for i in range(len(prompts))]

    def truncated(self, value: float) -> Score:
        """Score of a truncated response: `value` in every part."""
        return self._sum({name: Score(value, checked=False) for name in self._rewards})

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """The vote of the part that says success, else of the first part that has one."""
        order = [self._success] if self._success is not None else list(self._rewards)
        voting = [reward for name in order if isinstance(reward := self._rewards[name], Voting)]
        return voting[0].vote(prompt, completion) if voting else loose_answer(completion)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """See `rewards.base.NeedsColumns`."""
        for reward in self._rewards.values():
            if isinstance(reward, NeedsColumns):
                reward.check_prompts(prompts)

    def take_metrics(self) -> dict[str, float]:
        """See `rewards.base.Measured`."""
        return metrics_of(self._rewards.values())

    def close(self) -> None:
        """Close all parts."""
        for reward in self._rewards.values():
            reward.close()

    def _sum(self, scores: Mapping[str, Score]) -> Score:
        parts = {name: PartScore(score.value, self._weights[name], score.problem) for name, score in scores.items()}
        value = sum(part.weight * part.value for part in parts.values())
        problem = next((part.problem for part in parts.values() if part.problem), None)
        if not abs(value) <= LARGEST:  # of finite parts
            value, problem = 0.0, "not finite"
        said = list(scores.values()) if self._success is None else [scores[self._success]]
        return Score(
            value, parsed=any(score.parsed for score in said), checked=any(score.checked for score in scores.values()),
            problem=problem, outcome=None if self._success is None else parts[self._success].value, parts=parts,
        )  # fmt: skip
