"""Segmenters: cut a rollout into segments; pivots lie at segment ends."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from deepgrpo.config import SegmentConfig
from deepgrpo.errors import StrategyError
from deepgrpo.feedback import Reply
from deepgrpo.loading import load_object, show, where
from deepgrpo.records import Node

Segmenter = Callable[[Sequence[int]], list[int]]
"""tokens → ascending ends of segments; the last one is the number of tokens."""

_SENTENCE_ENDS = (".", "!", "?", "\n", "。", "！", "？")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_BROKEN = "\ufffd"
_MOST_PARTS = 8
"""Most tokens of one character."""
_CLOSERS = "\"')]}*”’ "


def build_segmenter(config: SegmentConfig, tokenizer: Any) -> Segmenter:
    """The segmenter of a recipe.

    Raises ConfigError if a user's function cannot be loaded; the segmenter of one raises StrategyError.
    """
    decode = cache(lambda *tokens: str(tokenizer.decode(list(tokens))))

    def texts(tokens: Sequence[int]) -> list[str]:
        return token_texts(tokens, decode)

    if config.type == "turn":
        return lambda tokens: _close([], len(tokens))
    if config.type == "sentence":
        ends = _SENTENCE_ENDS + config.extra_ends
        return lambda tokens: sentence_ends(texts(tokens), ends)
    if config.type == "period":
        return lambda tokens: _close([i + 1 for i, text in enumerate(texts(tokens)) if text == "."], len(tokens))
    if config.type == "step":
        return lambda tokens: step_ends(texts(tokens))
    if config.type == "user":
        assert config.function is not None  # the section is checked for it
        function, name = load_object(config.function, "explore.segments.function"), config.function
        return lambda tokens: user_ends(function, name, texts(tokens))
    if config.type == "tokens":
        return lambda tokens: _close(list(range(config.size, len(tokens), config.size)), len(tokens))
    return lambda tokens: count_ends(len(tokens), config.size)


def node_ends(segment: Segmenter, node: Node) -> list[int]:
    """Ends of a node's segments, where each turn of the model is cut by itself, and ends behind the environment's reply.

    So every end but the last is a state at which the model writes next. Without replies: `segment(node.tokens)`.

    Example, segments of two tokens: turns of 3 and 3 tokens with replies (3, 5) and (8, 10), and a last turn of 1 token have
    the ends 2, 5, 7, 10, 11.
    """
    return episode_ends(segment, node.tokens, node.replies)


def episode_ends(segment: Segmenter, tokens: Sequence[int], replies: Sequence[Reply]) -> list[int]:
    """`node_ends` of any tokens with the replies among them."""
    if not replies:
        return segment(tokens)
    found: list[int] = []
    start = 0
    for reply in replies:
        ends = [start + end for end in segment(tokens[start : reply.start])]
        found += [*ends[:-1], reply.end] if ends else [reply.end]
        start = reply.end
    found += [start + end for end in segment(tokens[start:])]
    return sorted({end for end in found if end > 0})


def token_texts(tokens: Sequence[int], decode: Callable[..., str]) -> list[str]:
    """Decode tokens one by one; where several form one character, the last of them has it and the others are empty.

    Args:
        decode: tokens, as arguments → their text. U+FFFD stands for bytes that form no character yet.
    """
    found: list[str] = []
    start = 0
    while start < len(tokens):
        for end in range(start + 1, min(start + _MOST_PARTS, len(tokens)) + 1):
            text = decode(*tokens[start:end])
            if not text.endswith(_BROKEN):
                break
        else:  # never completed: the decoder's own output
            end, text = start + 1, decode(tokens[start])
        found += [*[""] * (end - start - 1), text]
        start = end
    return found


def sentence_ends(texts: Sequence[str], ends: Sequence[str] = _SENTENCE_ENDS) -> list[int]:
    """Segments end at a token whose text ends a sentence or a line, ignoring closing quotes and brackets.

    A full stop that is followed by a digit is a decimal point: `["3", ".", "5", " apples", "."]` has one end, 5.
    """
    found: list[int] = []
    for i, text in enumerate(texts):
        bare = text if text.endswith("\n") else text.rstrip(_CLOSERS)
        if found and found[-1] == i and not text.strip():
            found[-1] = i + 1  # white space after an end belongs to it: no segment is only a line break
            continue
        if not bare.endswith(tuple(ends)):
            continue
        following = texts[i + 1] if i + 1 < len(texts) else ""
        if bare.endswith(".") and following[:1].isdigit():
            continue
        found.append(i + 1)
    return _close(found, len(texts))


def step_ends(texts: Sequence[str]) -> list[int]:
    """Segments end at the token that completes a blank line, which may span several tokens and contain spaces.

    All line breaks of a gap belong to the step before it, so no step is blank.
    """
    found: list[int] = []
    pending = ""
    for i, text in enumerate(texts):
        if found and found[-1] == i and not text.strip():
            found[-1] = i + 1
            continue
        pending = (pending + text).lstrip()
        *_, rest = _BLANK_LINE.split(pending)
        if rest != pending:
            found.append(i + 1)
            pending = rest
    return _close(found, len(texts))


def user_ends(function: Callable[[Sequence[str]], Any], name: str, texts: Sequence[str]) -> list[int]:
    """Ends of segments by a user's function, from token texts; the end of the last token is added if it is missing.

    Raises StrategyError: the function raises, or its ends are no ints, not ascending, or outside 1 to `len(texts)`.
    """
    if not texts:
        return []
    head, count = f"the segmenter {name!r}", len(texts)
    try:
        found = function(texts)
        ends = list(found.tolist() if hasattr(found, "tolist") else found) if isinstance(found, Iterable) else None
    except (Exception, SystemExit) as error:
        raise StrategyError(f"{head} raised {where(error)}; let it return a list of ints") from error
    if ends is None:
        raise StrategyError(f"{head} returned {show(found)}; let it return a list of ints")
    plain: list[int] = []
    for end in ends:
        if isinstance(end, bool) or not isinstance(end, numbers.Integral):
            raise StrategyError(f"{head} returned {show(end)} as an end; return a list of ints")
        if not 1 <= int(end) <= count:
            raise StrategyError(f"{head} returned the end {end} for {count} tokens; an end is from 1 to {count}")
        if plain and int(end) <= plain[-1]:
            raise StrategyError(f"{head} returned {end} after {plain[-1]}; return ascending ends, each once")
        plain.append(int(end))
    return _close(plain, count)


def count_ends(length: int, count: int) -> list[int]:
    """`count` parts whose sizes differ by at most one; fewer if there are fewer tokens."""
    return sorted({round(length * (i + 1) / count) for i in range(count)} - {0}) if length else []


def _close(ends: list[int], length: int) -> list[int]:
    """Add the end of the last token if it is missing."""
    return ends if not length or (ends and ends[-1] == length) else [*ends, length]
