"""Reward by a judge: a language model that grades responses over HTTP.

    prompt, response ─► the judge's prompt ─► known answer? (judge_cache.py) ──────────────┐
                                              else a request (judge_client.py) ─► answer ──┴─► number (judge_answer.py) ─► Score

A response whose judge cannot be asked, or whose answer has no score, gets `failure_value` and a problem; the run goes on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from deepgrpo.config import JudgeKeys
from deepgrpo.config.placeholders import Placeholder, pieces
from deepgrpo.errors import ConfigError, RewardError
from deepgrpo.feedback import Score
from deepgrpo.progress import phase
from deepgrpo.records import Prompt
from deepgrpo.rewards.base import Verifier, answer_part
from deepgrpo.rewards.judge_answer import read_score
from deepgrpo.rewards.judge_cache import AnswerCache, key_of
from deepgrpo.rewards.judge_client import Counts, JudgeClient


class JudgeReward:
    """The judge's grade, from 0 to 1. Equal questions to the judge in one round are asked once."""

    def __init__(self, config: Any, key: str | None) -> None:
        """Build from a section with `JudgeKeys` and `reasoning_tags`, and the key that the server wants."""
        self._config: JudgeKeys = config
        self._tags = config.reasoning_tags
        self._counts = Counts()
        self._client = JudgeClient(config, key, self._counts)
        self._cache = AnswerCache(config.cache)

    @classmethod
    def build(cls, config: JudgeKeys, task: Verifier | None) -> JudgeReward:
        """Raises ConfigError if the environment has no key, or none that a header can carry."""
        return cls(config, _key(config.api_key_env))

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        """See `Reward.score`. Raises RewardError: a row cannot fill a placeholder, or the server refuses all requests."""
        bodies = [self._body(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        keys = [key_of(body) for body in bodies]
        asked = dict(zip(keys, bodies, strict=True))
        scores: dict[str, Score] = {}
        for key, answer in self._cache.find(list(asked)).items():
            scores[key] = self._read(answer)
        self._counts.cached += sum(key in scores for key in keys)
        new = [key for key in asked if key not in scores]

        def heard(index: int, answer: str) -> None:
            advance()
            scores[new[index]] = score = self._read(answer)
            if score.problem is None:  # an answer without a score is asked for again
                self._cache.keep(new[index], answer)

        with phase("asking the judge", len(new)) as advance:
            replies = self._client.ask([asked[key] for key in new], heard) if new else []
        for key, reply in zip(new, replies, strict=True):
            if reply.problem is not None:
                scores[key] = Score(self._config.failure_value, problem=reply.problem)
        self._counts.failures += sum(scores[key].problem is not None for key in keys)
        return [scores[key] for key in keys]

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """See `rewards.base.NeedsColumns`."""
        for prompt in prompts:
            self._body(prompt, "")

    def take_metrics(self) -> dict[str, float]:
        """See `rewards.base.Measured`."""
        return self._counts.take()

    def close(self) -> None:
        self._cache.close()

    def _read(self, answer: str) -> Score:
        value = read_score(answer, self._config)
        return Score(self._config.failure_value, problem="unreadable") if value is None else Score(value)

    def _body(self, prompt: Prompt, completion: str) -> dict[str, Any]:
        config = self._config
        values = {
            **prompt.columns, "question": prompt.question, "prompt": prompt.text,
            "answer": " or ".join(prompt.accepted) or prompt.answer,
            "response": answer_part(prompt, completion, self._tags),
        }  # fmt: skip
        turns = [("system", config.system), ("user", config.prompt)]
        settings = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        return {
            "model": config.model,
            "messages": [{"role": role, "content": _fill(text, values, role)} for role, text in turns if text is not None],
            **{name: value for name, value in settings.items() if value is not None}, **config.options,
        }  # fmt: skip


def _fill(template: str, values: Mapping[str, Any], role: str) -> str:
    """The template with the row's values; filled-in text is not read again."""
    return "".join(piece if isinstance(piece, str) else _shown(piece, values, role) for piece in pieces(template))


def _shown(placeholder: Placeholder, values: Mapping[str, Any], role: str) -> str:
    value: Any = values
    for part in [placeholder.name] if placeholder.name in values else placeholder.name.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            value = None
    if value is not None:
        return str(value)
    if not placeholder.required:
        return placeholder.text
    key = "reward.system" if role == "system" else "reward.prompt"
    raise RewardError(
        f"{key} has the placeholder {placeholder.text}, for which a row has no value; it may name {', '.join(values)}; write "
        f"{{{placeholder.text}}} if the braces are meant as text"
    )


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise ConfigError(
            f"reward.api_key_env is {name!r}, but there is no such environment variable; set it: export {name}=…"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"the environment variable {name} (reward.api_key_env) holds no key: a key has no blanks and is ASCII"
        )
    return key
