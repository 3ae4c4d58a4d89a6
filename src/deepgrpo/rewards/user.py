"""A user's own reward function, with the signature that TRL uses.

    def reward(prompts, completions, completion_ids, answer, **columns) -> list[float | None]

Every argument is a list with one entry per response.

- `prompts`, `completions`: strings, the model's input and output, also with a chat template. With
  `reward.format = "messages"` both are lists of messages, as in TRL for conversational data and as its own functions
  (`trl.rewards:accuracy_reward`) require: a prompt is [{"role": "user", "content": question}], without the template's
  wording and system turn; a completion is [{"role": "assistant", "content": text}].
- `completion_ids`: tokens of the completions.
- `answer`: the reference as a string, or a list of strings for a row with several.
- `columns`: the other columns of the data, None for a row without the column.

TRL's `trainer_state`, `log_extra` and `log_metric` are not passed. A function without `**kwargs` gets only the
arguments that its parameters name.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from deepgrpo.config import UserReward
from deepgrpo.errors import RewardError
from deepgrpo.loading import load_object, show
from deepgrpo.records import Prompt, Score
from deepgrpo.rewards.base import Verifier

_RESERVED = ("prompts", "completions", "completion_ids", "answer")


class UserFunctionReward:
    """Reward by a user's function, called once per round of responses.

    A returned None scores 0 with `parsed` False; NaN or infinity scores 0 with the problem "not finite".
    """

    def __init__(self, config: UserReward) -> None:
        """Load the function. Raises ConfigError if it cannot be loaded."""
        self._name = config.function
        self._timeout = config.timeout_s
        self._messages = config.format == "messages"
        self._function = load_object(config.function, "reward.function")

    @classmethod
    def build(cls, config: UserReward, task: Verifier | None) -> UserFunctionReward:
        return cls(config)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        """See `Reward.score`. Raises RewardError: the function raises, times out, or returns no list of numbers.

        The call runs in a daemon thread. Python cannot kill a thread: after a timeout it runs until the process exits.
        """
        if not prompts:
            return []
        arguments = self._arguments(prompts, completions, completion_ids)
        outcome: list[Any] = []
        failure: list[BaseException] = []

        def call() -> None:
            try:
                result = self._function(**arguments)
                outcome.append(asyncio.run(_wait(result)) if inspect.isawaitable(result) else result)
            except BaseException as error:  # SystemExit too, which a thread would swallow
                failure.append(error)

        thread = threading.Thread(target=call, name="deepgrpo-reward", daemon=True)
        thread.start()
        thread.join(self._timeout)
        if failure:
            error = failure[0]
            tail = "".join(traceback.format_exception(error)[-3:]).rstrip()
            raise RewardError(
                f"the reward function {self._name!r} raised {type(error).__name__}: {error}; correct the function, or "
                f"let it return None for what it cannot score. The end of the traceback:\n{tail}"
            ) from error
        if not outcome:
            raise RewardError(
                f"the reward function {self._name!r} did not return within reward.timeout_s = {self._timeout:g} s for "
                f"{len(prompts)} responses; make it faster or raise reward.timeout_s"
            )
        return self._scores(outcome[0], len(prompts))

    def close(self) -> None:
        pass

    def _arguments(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> dict[str, Any]:
        names = dict.fromkeys(key for prompt in prompts for key in prompt.columns)
        columns: dict[str, list[Any]] = {
            name: [prompt.columns.get(name) for prompt in prompts] for name in names if name not in _RESERVED
        }
        given = {
            "prompts": [_message("user", p.question) if self._messages else p.text for p in prompts],
            "completions": [_message("assistant", text) if self._messages else text for text in completions],
            "completion_ids": [list(ids) for ids in completion_ids],
            "answer": [list(prompt.accepted) or prompt.answer for prompt in prompts],
            **columns,
        }
        parameters = inspect.signature(self._function).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            wanted = given
        else:
            wanted = {p.name: given[p.name] for p in parameters if p.name in given}
        missing = [
            p.name
            for p in parameters
            if p.name not in given
            and p.default is p.empty
            and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.POSITIONAL_ONLY)
        ]
        if missing:
            raise RewardError(
                f"the reward function {self._name!r} asks for {', '.join(map(repr, missing))}, which the data does not "
                f"have; it may ask for {', '.join(given)}; rename the parameter or give it a default"
            )
        return wanted

    def _scores(self, returned: Any, count: int) -> list[Score]:
        try:
            # tolist converts numpy arrays and torch tensors to numbers
            entries = list(returned.tolist() if hasattr(returned, "tolist") else returned)
        except TypeError:
            raise RewardError(
                f"the reward function {self._name!r} returned {show(returned)}; return a list with one number "
                f"(or None) per response, {count} here"
            ) from None
        if isinstance(returned, str | bytes | dict):
            raise RewardError(
                f"the reward function {self._name!r} returned {show(returned)}; return a list of {count} numbers"
            )
        if len(entries) != count:
            raise RewardError(
                f"the reward function {self._name!r} returned {len(entries)} rewards for {count} responses; "
                "return one per response, None for those it cannot score"
            )
        return [self._entry(index, entry) for index, entry in enumerate(entries)]

    def _entry(self, index: int, entry: Any) -> Score:
        if entry is None:
            return Score(0.0, parsed=False)
        if hasattr(entry, "item"):
            entry = entry.item()
        if not isinstance(entry, numbers.Real):
            raise RewardError(
                f"the reward function {self._name!r} returned {show(entry)} for response {index}; "
                "return a number or None"
            )
        value = float(entry)
        return Score(value) if math.isfinite(value) else Score(0.0, problem="not finite")


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


async def _wait(awaitable: Any) -> Any:
    return await awaitable
