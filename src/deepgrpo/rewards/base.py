"""What a reward is, and the rule for responses that were cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from deepgrpo.errors import RewardError
from deepgrpo.records import FinishReason, Prompt, Score


class Reward(Protocol):
    """Scores responses. Lists are aligned; a response's score depends on its own row only (a user's function aside)."""

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[tuple[int, ...]],
    ) -> list[Score]:
        """One score per response, in order. `completions` are texts without the prompt and without special tokens.

        Raises RewardError if scoring cannot go on at all; what goes wrong with one sample is its `Score.problem`.
        """
        ...

    def close(self) -> None:
        """Free workers. A closed reward is not used again; closing twice does nothing."""
        ...


class Verifier(Protocol):
    """Anything that can judge one completion, such as `prompts.tasks.Task`."""

    def verify(self, prompt: Prompt, completion: str) -> Score: ...


@runtime_checkable
class RemoteVerifier(Verifier, Protocol):
    """A verifier whose checks may hang: they run in worker processes that can be killed. All functions are picklable."""

    def preparation(self) -> Callable[[], None]:
        """What a worker does once, before its first check."""
        ...

    def check(self, prompt: Prompt, completion: str) -> Callable[[], tuple[float, bool]] | None:
        """The check of one completion, giving (value, found); None if there is no answer to check."""
        ...


@runtime_checkable
class Voting(Protocol):
    """A reward, or a verifier, that says which answer of a response it reads: maj@k votes over these."""

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """The answer as a short text, equal for responses that agree; None if there is none."""
        ...


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
    """Score responses; those that were cut off get `truncated_value`, and the reward never sees them.

    With `truncated_value` None they are scored like any other. A truncated response keeps `parsed` True: nobody
    looked for its answer. Order is kept.

    `penalty` of the prompt and the response's length in tokens, 0 or less, is added to every value, whatever that came from.
    """
    asked = [i for i, finish in enumerate(finishes) if truncated_value is None or finish != "length"]
    scores = [Score(0.0 if truncated_value is None else truncated_value, checked=False)] * len(finishes)
    if asked:
        found = reward.score(
            [prompts[i] for i in asked], [completions[i] for i in asked], [completion_ids[i] for i in asked]
        )
        for i, score in zip(asked, found, strict=True):
            scores[i] = score
    if penalty is None:
        return scores
    return [
        replace(score, value=score.value + penalty(prompt, len(ids)))
        for score, prompt, ids in zip(scores, prompts, completion_ids, strict=True)
    ]


def references(prompt: Prompt, wanted_by: str) -> tuple[str, ...]:
    """The accepted answers: the list in the column `accepted_answers` where a row has several, else `Prompt.answer`.

    Raises RewardError if there is none; `wanted_by` is the reward, for the message.
    """
    accepted = prompt.columns.get("accepted_answers")
    if isinstance(accepted, list | tuple) and accepted:
        return tuple(map(str, accepted))
    if prompt.answer is None:
        raise RewardError(
            f"prompt {prompt.id!r} has no reference answer, but {wanted_by} compares with one; set data.columns.answer "
            'to the column with the answers, or choose reward.type = "user"'
        )
    return (prompt.answer,)
