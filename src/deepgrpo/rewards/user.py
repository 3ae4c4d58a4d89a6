"""A user's own reward function, with the signature that TRL uses.

    def reward(prompts, completions, completion_ids, answer, **columns) -> list[float | None]

Everything is a list with one entry per response. `prompts` are the texts that the model read, `completions` those that
it wrote: plain strings, also where a chat template was used. With `reward.format = "messages"` both are lists of messages,
as TRL hands them over for conversational data and as its own functions (`trl.rewards:accuracy_reward`) want them: a prompt
is [{"role": "user", "content": the question}], without the template's wording and system turn, a completion
[{"role": "assistant", "content": text}].
`answer` is the reference as a string, or a list of strings for a row with several. `columns` are the other columns
of the data; a row that lacks one has None there. Of TRL's extras `trainer_state`, `log_extra` and `log_metric`
nothing is passed. A function without `**kwargs` gets only what its parameters name.
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

_RESERVED = ("prompts", "completions", "completion_ids", "answer")


class UserFunctionReward:
    """Calls a function once per round of responses.

    An entry that is None scores 0 with `parsed` False (the function had nothing to say); one that is NaN or infinite
    scores 0 with the problem "not finite".
    """

    def __init__(self, config: UserReward) -> None:
        """Raises ConfigError if the function cannot be found."""
        self._name = config.function
        self._timeout = config.timeout_s
        self._messages = config.format == "messages"
        self._function = load_object(config.function, "reward.function")

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        """Raises RewardError: the function raises, takes too long, or returns anything but one number per response.

        The call runs in a daemon thread. Python cannot kill a thread: one that has passed the limit runs on until
        the process ends, which the error brings about.
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
            except BaseException as error:  # SystemExit too: a thread would swallow it
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
        accepted = columns.pop("accepted_answers", [None] * len(prompts))
        given = {
            "prompts": [_message("user", p.question) if self._messages else p.text for p in prompts],
            "completions": [_message("assistant", text) if self._messages else text for text in completions],
            "completion_ids": [list(ids) for ids in completion_ids],
            "answer": [several or prompt.answer for several, prompt in zip(accepted, prompts, strict=True)],
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
            # tolist: numpy arrays and torch tensors become plain numbers
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
