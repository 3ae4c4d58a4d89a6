"""A user's own reward function, with the signature that TRL uses.

    def reward(prompts, completions, completion_ids, answer, **columns) -> list[float | None]

Every argument is a list with one entry per response.

- `prompts`, `completions`: strings, the model's input and output, also with a chat template. Where the data have prompts as
  messages, both are lists of messages, as in TRL: a prompt is the messages of its row, without the template's wording and
  system turn; a completion is [{"role": "assistant", "content": text}]. `reward.format` = "messages" makes questions messages
  too ([{"role": "user", "content": question}]), as TRL's own functions (`trl.rewards:accuracy_reward`) require; "text" makes
  messages strings.
- `completion_ids`: tokens of the completions.
- `answer`: the reference as a string, or a list of strings for a row with several.
- `columns`: the other columns of the data, None for a row without the column.

TRL's `trainer_state`, `log_extra` and `log_metric` are not passed. A function without `**kwargs` gets only the
arguments that its parameters name.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Sequence
from typing import Any

from deepgrpo import rng
from deepgrpo.config import UserKeys
from deepgrpo.config.base import GIVEN
from deepgrpo.errors import ConfigError, RewardError
from deepgrpo.feedback import Score
from deepgrpo.loading import file_of, load_object
from deepgrpo.progress import phase
from deepgrpo.records import Prompt
from deepgrpo.rewards.base import Verifier
from deepgrpo.rewards.call import call_within
from deepgrpo.rewards.returned import read_scores
from deepgrpo.rewards.witness import Witness

_RESERVED = ("prompts", "completions", "completion_ids", "answer")
_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class UserFunctionReward:
    """Reward by a user's function, called once per round of responses (`rewards.call`, `rewards.returned`)."""

    def __init__(self, config: UserKeys) -> None:
        """Load the function. Raises ConfigError if it cannot be loaded or called with named arguments."""
        self._name = config.function.removeprefix(GIVEN)
        self._timeout = config.timeout_s
        self._format = config.format
        self._function = load_object(config.function, "reward.function") if config.held is None else config.held
        self._parameters = _parameters(self._function, config.function)
        self._file = file_of(self._function)
        self._witness = Witness(self._name, self._file)

    @classmethod
    def build(cls, config: UserKeys, task: Verifier | None) -> UserFunctionReward:
        return cls(config)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        """See `Reward.score`. Raises RewardError: the function raises, times out, or returns no list of numbers."""
        if not prompts:
            return []
        given, named = self._arguments(prompts, completions, completion_ids)

        def work() -> list[Score]:
            result = self._function(*given, **named)
            if inspect.isawaitable(result):
                result = asyncio.run(_wait(result))
            return read_scores(result, len(prompts), self._name)

        with phase(f"scoring {len(prompts):,} responses with {self._name.rpartition(':')[2]}"):
            return call_within(
                self._timeout, work, name=self._name, file=self._file, count=len(prompts), witness=self._witness,
                # what the function draws depends on the responses, not on its earlier calls: a resumed run draws the same
                seed=rng.key("reward", *(token for ids in completion_ids for token in ids)) >> 1,
            )  # fmt: skip

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """See `rewards.base.NeedsColumns`."""
        self._arguments(prompts, [""] * len(prompts), [()] * len(prompts))

    def close(self) -> None:
        """See `Reward.close`."""
        self._witness.close()

    def _takes_messages(self, prompt: Prompt) -> bool:
        return self._format == "messages" or (self._format == "auto" and bool(prompt.messages))

    def _arguments(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments that the function's parameters name: by position where nothing else is allowed, else by name."""
        names = dict.fromkeys(key for prompt in prompts for key in prompt.columns)
        # copies: a function that changes its arguments must not change the prompts
        columns: dict[str, list[Any]] = {
            name: copy.deepcopy([prompt.columns.get(name) for prompt in prompts]) for name in names if name not in _RESERVED
        }
        given = {
            "prompts": [_messages_of(p) if self._takes_messages(p) else p.text for p in prompts],
            "completions": [
                [{"role": "assistant", "content": text}] if self._takes_messages(p) else text
                for p, text in zip(prompts, completions, strict=True)
            ],
            "completion_ids": [list(ids) for ids in completion_ids],
            "answer": [list(prompt.accepted) or prompt.answer for prompt in prompts],
            **columns,
        }
        missing = [p.name for p in self._parameters if p.kind in _NAMED and p.name not in given and p.default is p.empty]
        if missing:
            raise RewardError(
                f"the reward function {self._name!r} asks for {', '.join(map(repr, missing))}, which the data does not "
                f"have; it may ask for {', '.join(given)}; rename the parameter or give it a default"
            )
        positional = [
            given.pop(p.name) if p.name in given else p.default for p in self._parameters if p.kind is p.POSITIONAL_ONLY
        ]
        if any(p.kind is p.VAR_KEYWORD for p in self._parameters):
            return positional, given
        return positional, {p.name: given[p.name] for p in self._parameters if p.name in given}


def _parameters(function: Any, reference: str) -> list[inspect.Parameter]:
    """Parameters of a reward function. Raises ConfigError if it is a class, or cannot be called with named arguments."""
    said = f"reward.function is {reference!r}, which"
    if isinstance(function, type):
        raise ConfigError(
            f"{said} is a class; name a function, or an instance with __call__: `judge = {function.__name__}()` in the file, "
            f"and `{reference.rpartition(':')[0]}:judge` here"
        )
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise ConfigError(f"{said} does not say what parameters it has; call it from a function of your own") from None
    if parameters and all(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise ConfigError(
            f"{said} takes only *{parameters[0].name}, and arguments are passed by name; write "
            "`def reward(completions, answer, **columns)`"
        )
    return parameters


def _messages_of(prompt: Prompt) -> list[Any]:
    return copy.deepcopy(list(prompt.messages)) or [{"role": "user", "content": prompt.question}]


async def _wait(awaitable: Any) -> Any:
    return await awaitable
