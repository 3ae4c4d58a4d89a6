"""When a continuation ends before its limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def completes_stop(tokenizer: Any, stop: Sequence[str], before: Sequence[int], tokens: Sequence[int]) -> bool:
    """Whether the newest of `tokens` completes a stop string.

    Args:
        tokenizer: decodes the tokens.
        stop: the stop strings.
        before: tokens of the response from before it was continued: a stop string may have begun there.
        tokens: the sampled tokens, at least one.
    """
    if not stop:
        return False
    # a token can bring several characters and a stop string several tokens: look at a tail that surely holds it
    length = max(map(len, stop)) + 8
    tail = [*before[max(0, len(before) + len(tokens) - length) :], *tokens[-length:]]
    # special tokens included: "<|im_end|>" is a fair stop string
    text, without = tokenizer.decode(tail), tokenizer.decode(tail[:-1])
    return any(text.count(one) > without.count(one) for one in stop)
