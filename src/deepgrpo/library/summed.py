"""Several reward functions as one: the weighted sum of what they return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from deepgrpo.rewards.returned import read_scores


class SummedRewards:
    """A reward function that calls others and adds what they return, each times its weight.

    Each gets the arguments that its parameters name. A response that one of them cannot score (None) gets nothing from it; one
    that none can score is unparsed.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]], weights: Sequence[float] | None = None) -> None:
        self.functions = list(functions)
        self.weights = [1.0] * len(self.functions) if weights is None else [float(weight) for weight in weights]
        self.__name__ = "+".join(getattr(each, "__name__", type(each).__name__) for each in self.functions)

    async def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """The sums, one per response."""
        total = [0.0] * len(completions)
        parsed = [False] * len(completions)
        for function, weight in zip(self.functions, self.weights, strict=True):
            returned = function(**_named(function, {"completions": completions, **columns}))
            if inspect.isawaitable(returned):
                returned = await returned
            for index, score in enumerate(read_scores(returned, len(completions), getattr(function, "__name__", "reward"))):
                total[index] += weight * score.value
                parsed[index] |= score.parsed
        return [value if there else None for value, there in zip(total, parsed, strict=True)]


def _named(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function's parameters name; all of them if it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return given
    return {each.name: given[each.name] for each in parameters if each.name in given}
