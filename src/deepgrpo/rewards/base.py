"""The `Reward` protocol, what a reward sees of a response or an episode, reference answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, runtime_checkable

from deepgrpo.answers.reasoning import USUAL_TAGS, outside_reasoning
from deepgrpo.config import OVERLONG
from deepgrpo.errors import RewardError
from deepgrpo.feedback import PartScore, Reply, Score
from deepgrpo.records import FinishReason, Prompt


class Reward(Protocol):
    """Scores responses. Except for a user's function, a score depends on its own prompt and response only."""

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[tuple[int, ...]],
    ) -> list[Score]:
        """One score per response, in order.

        Args:
            prompts: prompt of each response.
            completions: texts of the responses, without the prompt and without special tokens.
            completion_ids: tokens of the responses.

        Raises RewardError if scoring is impossible. A failure on one sample is its `Score.problem`.
        """

    def close(self) -> None:
        """Stop worker processes. Do not score afterwards; closing twice is harmless."""


class Verifier(Protocol):
    """Scores one completion, e.g. `prompts.tasks.Task`."""

    def verify(self, prompt: Prompt, completion: str) -> Score: ...


@runtime_checkable
class RemoteVerifier(Verifier, Protocol):
    """Verifier whose checks may hang, so they run in worker processes. All functions are picklable."""

    def preparation(self) -> Callable[[], None]:
        """Initializer of a worker, run once before its first check."""

    def check(self, prompt: Prompt, completion: str) -> Callable[[], tuple[float, bool]] | None:
        """Check of one completion, returning (value, found); None if the completion has no answer."""


@runtime_checkable
class Voting(Protocol):
    """Reward or verifier that exposes the answer it reads, for the votes of maj@k."""

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """The answer as a short text, equal for responses that agree; None without an answer."""


@runtime_checkable
class Measured(Protocol):
    """Reward with metrics of its own."""

    def take_metrics(self) -> dict[str, float]:
        """Metrics since they were last taken."""


@runtime_checkable
class NeedsColumns(Protocol):
    """Reward that needs certain columns of the data."""

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise RewardError, before any sampling, if a prompt lacks what the reward needs."""


@runtime_checkable
class Composite(Protocol):
    """Reward whose scores have parts, also those of truncated responses."""

    def truncated(self, value: float) -> Score:
        """Score of a truncated response, with `value` in every part."""


def judge(
    reward: Reward,
    truncated_value: float | None,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    completion_ids: Sequence[tuple[int, ...]],
    finishes: Sequence[FinishReason],
    *,
    penalty: Callable[[Prompt, int], float] | None = None,
) -> list[Score]:
    """Score responses; truncated ones get `truncated_value` without a call of the reward.

    Args:
        reward: scores the other responses.
        truncated_value: reward of a truncated response, with `checked` False and `parsed` True; None: score it like
            any other.
        prompts, completions, completion_ids: as in `Reward.score`.
        finishes: why each response ended.
        penalty: function of the prompt and the response's length in tokens, at most 0; added to every value.

    Returns:
        one score per response, in order.
    """
    asked = [i for i, finish in enumerate(finishes) if truncated_value is None or finish != "length"]
    scores = [truncated_score(reward, truncated_value or 0.0)] * len(finishes)
    if asked:
        found = reward.score(
            [prompts[i] for i in asked], [completions[i] for i in asked], [completion_ids[i] for i in asked]
        )
        for i, score in zip(asked, found, strict=True):
            scores[i] = score
    if penalty is None:
        return scores
    return [
        _penalised(score, penalty(prompt, len(ids)))
        for score, prompt, ids in zip(scores, prompts, completion_ids, strict=True)
    ]


def for_reward(prompt: Prompt, replies: Sequence[Reply], response: tuple[int, ...]) -> tuple[Prompt, tuple[int, ...]]:
    """Input of a reward for an episode: the prompt with columns about it, and the tokens of the model's last turn.

    Columns: `turn_rewards`, the environment's reward of each turn, and `observations`, both in order.

    Args:
        replies: of the whole episode, in response tokens.
    """
    columns: dict[str, Any] = {
        **prompt.columns,
        "turn_rewards": [0.0 if reply.reward is None else reply.reward for reply in replies],
        "observations": [reply.observation for reply in replies],
    }
    last = max((reply.end for reply in replies if reply.end < len(response)), default=0)
    return replace(prompt, columns=columns), response[last:]


def metrics_of(rewards: Iterable[Reward]) -> dict[str, float]:
    """Metrics of rewards since they were last taken, added up."""
    found: Counter[str] = Counter()
    for reward in rewards:
        found.update(reward.take_metrics() if isinstance(reward, Measured) else {})
    return dict(found)


def truncated_score(reward: Reward, value: float) -> Score:
    """Score of a truncated response that the reward does not see."""
    return reward.truncated(value) if isinstance(reward, Composite) else Score(value, checked=False)


def _penalised(score: Score, penalty: float) -> Score:
    """The score with a penalty added, as a part of its own if there are parts."""
    parts = {**score.parts, OVERLONG: PartScore(penalty)} if score.parts else score.parts
    return replace(score, value=score.value + penalty, parts=parts)


def references(prompt: Prompt, wanted_by: str) -> tuple[str, ...]:
    """Accepted answers: `Prompt.accepted` of a row with several, else `Prompt.answer`.

    Args:
        prompt: the prompt.
        wanted_by: the reward that compares, for the message.

    Raises RewardError if the prompt has no reference answer.
    """
    if prompt.accepted:
        return prompt.accepted
    if prompt.answer is None:
        raise RewardError(
            f"prompt {prompt.id!r} has no reference answer, but {wanted_by} compares with one; set data.columns.answer "
            'to the column with the answers, or choose reward.type = "user"'
        )
    return (prompt.answer,)


def answer_part(prompt: Prompt, completion: str, tags: tuple[str, str] | Literal["auto"] | None) -> str:
    """The response without its reasoning, by `reward.reasoning_tags`."""
    if tags is None:
        return completion
    return outside_reasoning(prompt.text, completion, USUAL_TAGS if tags == "auto" else tags)
