"""Rewards that a user's function returned, read into scores.

The user's code may run meanwhile: generators, `__float__`, `repr`.

    a list, tuple, array, tensor, generator of numbers ─► one Score each
    None                                               ─► 0, `parsed` False
    NaN, infinities, numbers beyond float32            ─► 0, problem "not finite"
    anything else                                      ─► RewardError
"""

from __future__ import annotations

import decimal
import inspect
import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Set
from typing import Any

from deepgrpo.errors import RewardError
from deepgrpo.feedback import Score
from deepgrpo.loading import show

LARGEST = 3.4e38
"""The learner computes in float32, which ends there."""


def read_scores(returned: Any, count: int, name: str) -> list[Score]:
    """One score per response. At most `count` + 1 entries are taken, so an endless iterator ends.

    Args:
        returned: what the function returned.
        count: number of responses.
        name: the function, for messages.

    Raises RewardError: it is no sequence, of another length, or has an entry that is no number.
    """
    head = f"the reward function {name!r} returned"
    if inspect.isawaitable(returned) or inspect.isasyncgen(returned):
        _forget(returned)
        raise RewardError(f"{head} {show(returned)}; return a list of {count} numbers from an `async def`, or await it")
    if isinstance(returned, Mapping | Set):
        raise RewardError(f"{head} {show(returned)}, which has no order of its own; return a list of {count} numbers")
    if isinstance(returned, str | bytes | bytearray | memoryview):
        raise RewardError(f"{head} {show(returned)}; return a list of {count} numbers")
    # tolist converts numpy arrays and torch tensors to numbers
    plain = returned.tolist() if hasattr(returned, "tolist") and not isinstance(returned, type) else returned
    if not isinstance(plain, Iterable) or isinstance(plain, type):
        raise RewardError(f"{head} {show(returned)}; return a list with one number (or None) per response, {count} here")
    entries = list(itertools.islice(plain, count + 1))
    if len(entries) != count:
        for entry in entries:
            _forget(entry)
        found = len(entries) if len(entries) < count else _length(plain, count)
        raise RewardError(
            f"{head} {found} rewards for {count} responses; return one per response, None for those it cannot score"
        )
    return [_score(index, entry, head) for index, entry in enumerate(entries)]


def _score(index: int, entry: Any, head: str) -> Score:
    if entry is None:
        return Score(0.0, parsed=False)
    number = entry
    if hasattr(entry, "item") and not isinstance(entry, type):
        try:
            number = entry.item()
        except Exception:  # several elements
            raise RewardError(f"{head} {show(entry)} for response {index}, which is not one number; return one") from None
    if not isinstance(number, numbers.Real | decimal.Decimal):
        _forget(entry)
        hint = "; await it" if inspect.isawaitable(entry) else ""
        raise RewardError(f"{head} {show(entry)} for response {index}; return a number or None{hint}")
    try:
        value = float(number)
    except (OverflowError, ValueError):  # 10**400; Decimal("sNaN")
        value = math.nan
    return Score(value) if abs(value) <= LARGEST else Score(0.0, problem="not finite")


def _length(plain: Iterable[Any], count: int) -> str:
    """The number of too many rewards, as far as it is known."""
    try:
        return str(len(plain))  # type: ignore[arg-type]
    except Exception:
        return f"more than {count}"


def _forget(value: Any) -> None:
    """Close a coroutine that is never awaited, to avoid Python's warning."""
    if inspect.iscoroutine(value):
        value.close()
