"""Mathematical answers, compared by math-verify in worker processes (`rewards.workers`).

    response ─► its answer ─► duplicate checks merged ─► worker (time limit) ─► Score

A check that hangs, crashes or raises scores 0 for its own samples and affects no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from deepgrpo.boxed import last_boxed
from deepgrpo.config import MathReward
from deepgrpo.records import Prompt, Score
from deepgrpo.rewards.base import Verifier, references
from deepgrpo.rewards.math_check import check_answer, warm_up
from deepgrpo.rewards.vote import loose_answer, normalise
from deepgrpo.rewards.workers import Workers

AnswerFormat = Literal["boxed", "gsm8k", "any"]
_Job = tuple[str, tuple[str, ...]]


class MathAnswerReward:
    """1 if the answer is mathematically equal to an accepted one, else 0. Workers start with the first call."""

    def __init__(
        self, config: MathReward, check: Callable[[str, tuple[str, ...]], tuple[bool, bool]] = check_answer
    ) -> None:
        """`check` runs in the workers, which import it by name; tests substitute faulty ones."""
        self._format: AnswerFormat = config.answer_format
        self._check = check
        self._workers = Workers(
            'reward.type = "math"', warm_up, "math_verify", count=config.workers, timeout_s=config.timeout_s
        )

    @classmethod
    def build(cls, config: MathReward, task: Verifier | None) -> MathAnswerReward:
        return cls(config)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        """See `Reward.score`. Raises RewardError: a prompt has no reference, or no worker can be started."""
        jobs: list[_Job | None] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            accepted = references(prompt, 'reward.type = "math"')
            text = find_answer(completion, self._format)
            jobs.append(None if text is None else (text, accepted))
        once = list(dict.fromkeys(job for job in jobs if job is not None))
        scores = dict(zip(once, self._workers.run([partial(self._check, *job) for job in once]), strict=True))
        return [Score(0.0, parsed=False) if job is None else scores[job] for job in jobs]

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """The normalised answer in its required place; with the format "any", `loose_answer`."""
        if self._format == "any":
            return loose_answer(completion)
        found = last_boxed(completion) if self._format == "boxed" else find_answer(completion, self._format)
        return (normalise(found) or None) if found is not None else None

    def close(self) -> None:
        """Stop the workers."""
        self._workers.close()


def find_answer(completion: str, answer_format: AnswerFormat) -> str | None:
    r"""The part of a response that math-verify parses, or None without an answer.

    boxed: the last \boxed{...} whose braces close. gsm8k: the rest of the line after the last '####'. any: the whole
    response.
    """
    if answer_format == "any":
        return completion if completion.strip() else None
    if answer_format == "gsm8k":
        _, found, answer = completion.rpartition("####")
        # only the line, as models often go on to explain
        answer = answer.strip().split("\n", 1)[0] if found else ""
        # math-verify reads the dollars of "$1,000" as currency, but not those of "\$1,000"
        return answer.replace("\\$", "$") or None
    content = last_boxed(completion)
    content = None if content is None else content.strip().rstrip(".").rstrip()
    return f"\\boxed{{{content}}}" if content else None
