"""Mathematical answers, compared as mathematics in worker processes (`rewards.workers`).

    response ─► its answer ─► numbers? compared at once ─► duplicates merged ─► worker (time limit) ─► Score

A check that hangs, crashes or raises scores 0 for its own samples and affects no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from deepgrpo.answers.places import AnswerFormat, find_answer
from deepgrpo.config import MathKeys
from deepgrpo.feedback import Score
from deepgrpo.records import Prompt
from deepgrpo.rewards.base import Verifier, answer_part, references
from deepgrpo.rewards.math_check import check_answer, warm_up
from deepgrpo.rewards.same import is_numeric, quick_verdict, read
from deepgrpo.rewards.vote import normalise
from deepgrpo.rewards.workers import Workers

_Job = tuple[str, tuple[str, ...]]


class MathAnswerReward:
    """1 if the answer is mathematically equal to an accepted one, else 0. Workers start with the first call."""

    def __init__(
        self, config: MathKeys, check: Callable[[str, tuple[str, ...]], tuple[bool, bool]] = check_answer
    ) -> None:
        """`check` runs in the workers, which import it by name; tests substitute faulty ones."""
        self._format: AnswerFormat = config.answer_format
        self._tags = config.reasoning_tags
        self._check = check
        self._workers = Workers(
            'reward.type = "math"', warm_up, "math_verify", count=config.workers, timeout_s=config.timeout_s
        )

    @classmethod
    def build(cls, config: MathKeys, task: Verifier | None) -> MathAnswerReward:
        return cls(config)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        """See `Reward.score`. Raises RewardError: a prompt has no reference, or no worker can be started."""
        jobs: list[_Job | None] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            accepted = references(prompt, 'reward.type = "math"')
            text = self._answer(prompt, completion, accepted)
            jobs.append(None if text is None else (text, accepted))
        once = list(dict.fromkeys(job for job in jobs if job is not None))
        scores = {job: Score(float(verdict)) for job in once if (verdict := quick_verdict(*job)) is not None}
        rest = [job for job in once if job not in scores]
        scores |= zip(rest, self._workers.run([partial(self._check, *job) for job in rest]), strict=True)
        if self._format == "boxed":  # a box is an answer, whatever is in it
            scores = {job: replace(score, parsed=True) for job, score in scores.items()}
        return [Score(0.0, parsed=False) if job is None else scores[job] for job in jobs]

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """See `rewards.base.NeedsColumns`."""
        for prompt in prompts:
            references(prompt, 'reward.type = "math"')

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """The answer that is scored, normalised; prose is no vote beside numbers."""
        accepted = (prompt.answer,) if prompt.answer is not None else ()
        found = self._answer(prompt, completion, accepted)
        if found is None or (found == completion.strip() and is_numeric(accepted) and read(found).kind == "words"):
            return None
        return normalise(found) or None

    def close(self) -> None:
        """Stop the workers."""
        self._workers.close()

    def _answer(self, prompt: Prompt, completion: str, accepted: tuple[str, ...]) -> str | None:
        shown = answer_part(prompt, completion, self._tags)
        return find_answer(shown, self._format, numeric=is_numeric(accepted)) or None
