"""Detection of stop strings in sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def completes_stop(tokenizer: Any, stop: Sequence[str], before: Sequence[int], tokens: Sequence[int]) -> bool:
    """Check whether the newest of `tokens` completes a stop string.

    Args:
        tokenizer: decodes the tokens.
        stop: the stop strings.
        before: response tokens that precede the continuation; a stop string may begin there.
        tokens: the sampled tokens, at least one.
    """
    if not stop:
        return False
    # one token may hold several characters, one stop string several tokens: decode a tail that is long enough for both
    length = max(map(len, stop)) + 8
    tail = [*before[max(0, len(before) + len(tokens) - length) :], *tokens[-length:]]
    # special tokens included: "<|im_end|>" is a valid stop string
    text, without = tokenizer.decode(tail), tokenizer.decode(tail[:-1])
    return any(text.count(one) > without.count(one) for one in stop)


def first_stop(tokenizer: Any, stop: Sequence[str], before: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Number of tokens up to and including the one that completes the first stop string; None if none is completed."""
    if not stop:
        return None
    # most responses have none: decoding the whole text once is cheaper than decoding a tail per token
    tail = before[-max(map(len, stop)) - 8 :]
    text = tokenizer.decode([*tail, *tokens])
    if not any(one in text for one in stop):
        return None
    ends = (n for n in range(1, len(tokens) + 1) if completes_stop(tokenizer, stop, before, tokens[:n]))
    return next(ends, None)
