"""Reward by string comparison after a marker."""

from __future__ import annotations

from collections.abc import Sequence

from deepgrpo.answers.numbers import drop_separators
from deepgrpo.config import ExactKeys
from deepgrpo.feedback import Score
from deepgrpo.records import Prompt
from deepgrpo.rewards.base import Verifier, answer_part, references


class ExactMatchReward:
    r"""1 if the text after the last marker, to the end of its line, equals a reference.

    Runs of white space equal one space; white space at the ends is ignored, and so are the commas of a text that is one
    number ("1,000" is "1000"). Nothing else is read as a number: "1000.0" and "+1000" differ from "1000".

    Example (marker "####"): "so 6 * 7\n#### 42 \n" equals "42". A response without the marker scores 0 with `parsed`
    False. The marker "" compares the whole response.
    """

    def __init__(self, config: ExactKeys) -> None:
        self._marker = config.marker
        self._tags = config.reasoning_tags

    @classmethod
    def build(cls, config: ExactKeys, task: Verifier | None) -> ExactMatchReward:
        return cls(config)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        return [self._one(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """See `rewards.base.NeedsColumns`."""
        for prompt in prompts:
            references(prompt, 'reward.type = "exact"')

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """The compared text."""
        return self._answer(prompt, completion) or None

    def close(self) -> None:
        pass

    def _one(self, prompt: Prompt, completion: str) -> Score:
        accepted = {_tidy(text) for text in references(prompt, 'reward.type = "exact"')}
        answer = self._answer(prompt, completion)
        return Score(0.0, parsed=False) if answer is None else Score(float(answer in accepted))

    def _answer(self, prompt: Prompt, completion: str) -> str | None:
        text = answer_part(prompt, completion, self._tags)
        if self._marker:
            _, found, text = text.rpartition(self._marker)
            if not found:
                return None
            text = text.split("\n", 1)[0]
        return _tidy(text)


def _tidy(text: str) -> str:
    return drop_separators(" ".join(text.split()))
