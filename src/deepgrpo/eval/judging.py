"""Judged completions of an evaluation: sampled, decoded, scored, and asked for their vote in maj@k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deepgrpo.engines.base import Engine, SampleStats, SamplingParams
from deepgrpo.explore.episodes import Episodes
from deepgrpo.feedback import Score
from deepgrpo.records import Completion, Prompt, SampleRequest
from deepgrpo.rewards.base import Reward, Voting, for_reward, judge
from deepgrpo.rewards.vote import loose_answer


@dataclass(frozen=True, slots=True)
class Judged:
    """A completion with its text, score and vote."""

    completion: Completion
    text: str
    score: Score
    vote: str | None
    """Vote in maj@k."""


@dataclass(frozen=True, slots=True)
class Round:
    """Judged completions of each request, and what they cost."""

    groups: list[list[Judged]]
    stats: SampleStats


@dataclass(frozen=True, slots=True)
class Judge:
    """Sample, decode and score a round of requests, chunk by chunk."""

    engine: Engine
    reward: Reward
    tokenizer: Any
    truncated_value: float | None
    chunk: int | None = None
    progress: Callable[[int], None] | None = None
    episodes: Episodes | None = None
    voting: bool = True
    """False: leave out the votes, which only maj@k needs."""

    def __call__(self, prompts: Sequence[Prompt], requests: Sequence[SampleRequest], params: SamplingParams) -> Round:
        groups: list[list[Judged]] = []
        stats = SampleStats()
        size = max(1, self.chunk // len(requests[0].keys)) if self.chunk else len(requests)
        for start in range(0, len(requests), size):
            part = slice(start, start + size)
            if self.episodes is None:
                batches, cost = self.engine.sample(requests[part], params)
            else:
                batches, cost, _ = self.episodes.answer(self.engine, prompts[part], requests[part], params)
            stats = stats + cost
            groups += self._score(prompts[part], batches)
        return Round(groups, stats)

    def _score(self, prompts: Sequence[Prompt], batches: Sequence[Sequence[Completion]]) -> list[list[Judged]]:
        flat = [(prompt, done) for prompt, batch in zip(prompts, batches, strict=True) for done in batch]
        texts = [self._decode(done.tokens) for _, done in flat]
        seen = [(prompt, text) for (prompt, _), text in zip(flat, texts, strict=True)]
        if self.episodes is not None:
            lasts = [for_reward(prompt, done.replies, done.tokens) for prompt, done in flat]
            seen = [(prompt, self._decode(tokens)) for prompt, tokens in lasts]
        scores = judge(
            self.reward,
            self.truncated_value,
            [prompt for prompt, _ in seen],
            [text for _, text in seen],
            [done.tokens for _, done in flat],
            [done.finish for _, done in flat],
        )
        judged = iter(
            [
                Judged(done, text, score, self._vote(*pair, done, score))
                for (_, done), text, pair, score in zip(flat, texts, seen, scores, strict=True)
            ]
        )
        groups = [[next(judged) for _ in batch] for batch in batches]
        if self.progress:
            self.progress(len(flat))
        return groups

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _vote(self, prompt: Prompt, text: str, done: Completion, score: Score) -> str | None:
        cut_off = done.finish == "length" and self.truncated_value is not None
        if not self.voting or cut_off or not score.parsed:
            return None
        return self.reward.vote(prompt, text) if isinstance(self.reward, Voting) else loose_answer(text)
