"""Reasoning tags: the part of a response that is its answer, without the thoughts before it."""

from __future__ import annotations

Tags = tuple[str, str]

USUAL_TAGS: Tags = ("<think>", "</think>")
"""Tags of the chat templates of Qwen, DeepSeek and others."""


def outside_reasoning(prompt: str, response: str, tags: Tags) -> str:
    """The response without its reasoning. Reasoning that never ends hides all that follows it.

    Args:
        prompt: the rendered prompt; a chat template may end it with the opening tag.
        response: the text behind it.
        tags: opening and closing tag.

    >>> outside_reasoning("1 + 1?", "<think>is it 3?</think>It is 2.", USUAL_TAGS)
    'It is 2.'
    >>> outside_reasoning("1 + 1?<think>", "is it 3?", USUAL_TAGS)
    ''
    """
    opening, closing = tags
    if opening not in response and closing not in response and not _ends_open(prompt, opening):
        return response
    # a closing tag without an opening one before it: the template, or a lost token, opened the reasoning
    first_close, first_open = response.find(closing), response.find(opening)
    inside = _ends_open(prompt, opening) or (first_close >= 0 and not 0 <= first_open < first_close)
    kept, position = [], 0
    while position < len(response):
        mark = closing if inside else opening
        at = response.find(mark, position)
        if not inside:
            kept.append(response[position : at if at >= 0 else len(response)])
        if at < 0:
            break
        position, inside = at + len(mark), not inside
    return "".join(kept)


def _ends_open(prompt: str, opening: str) -> bool:
    return prompt.rstrip().endswith(opening)
