"""Messages as a prompt: lists of {"role", "content"}, as TRL, verl and chat models write conversations.

    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]

The content is a text, or a list of parts {"type": "text", "text": ...}, which are joined. Further keys, such as the `name` of
a tool, go to the chat template. The question of such a prompt is the text of its last user turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Message = Mapping[str, Any]
"""One turn. Example: {"role": "user", "content": "1 + 1?"}."""

SYSTEM_ROLES = ("system", "developer")


class UnusableMessagesError(Exception):
    """Messages that are no prompt; the text says why and what to do."""


def are_messages(value: Any) -> bool:
    """True for a list of tables: a value that is meant as messages, whether or not they are usable."""
    return (
        isinstance(value, list | tuple | np.ndarray)
        and len(value) > 0
        and all(isinstance(each, Mapping) for each in value)
    )


def read_messages(value: Sequence[Any], last_assistant: str) -> tuple[Message, ...]:
    """Check messages and return them as they are, but for a last assistant turn that is dropped.

    Args:
        value: a list of tables (`are_messages`).
        last_assistant: "refuse", "drop" or "continue" messages that end with an assistant turn.

    Raises UnusableMessagesError: a turn has no role or no text, there is no user turn, or the last turn is the assistant's.
    """
    messages = tuple(value)
    for number, message in enumerate(messages):
        _check(number, message)
    if messages[-1]["role"] == "assistant":
        if last_assistant == "refuse":
            raise UnusableMessagesError(
                "the messages end with an assistant turn, which would be a part of the prompt; set "
                'data.columns.last_assistant to "drop" (the turn is the solution of the row) or "continue" (the model is to go '
                "on with it)"
            )
        if last_assistant == "drop":
            messages = messages[:-1]
    if not any(message["role"] == "user" for message in messages):
        raise UnusableMessagesError(
            "the messages have no user turn; set data.columns.question to a column with the whole prompt"
        )
    if messages[-1]["role"] in SYSTEM_ROLES:
        raise UnusableMessagesError(
            f"the messages end with a {messages[-1]['role']} turn; the last one is the user's or a tool's"
        )
    return messages


def _check(number: int, message: Message) -> None:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        hint = ""
        if "from" in message and "value" in message:
            hint = ' (the form of ShareGPT: write "role" for "from", "content" for "value", and user and assistant as roles)'
        raise UnusableMessagesError(
            f"turn {number} of the messages has no role; its keys are {', '.join(map(str, message)) or '(none)'}{hint}; "
            'a turn is {"role": "user", "content": "..."}'
        )
    content = message.get("content")
    if isinstance(content, str) or (content is None and role == "assistant" and message.get("tool_calls")):
        return
    if not isinstance(content, list | tuple | np.ndarray):
        raise UnusableMessagesError(
            f"the content of turn {number} ({role}) is {'missing' if content is None else f'a {type(content).__name__}'}; it "
            'should be a text, or a list of parts {"type": "text", "text": "..."}'
        )
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UnusableMessagesError(
                f"the content of turn {number} ({role}) has a part that is no text ({kind!r}); models of text alone are "
                "trained: leave such rows out of the data"
            )


def text_of(message: Message) -> str:
    """The text of a turn; its parts are joined."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)


def last_user(messages: Sequence[Message]) -> int:
    """Index of the last user turn."""
    return max(index for index, message in enumerate(messages) if message["role"] == "user")


def with_texts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copies of the messages for a chat template: content as text, and without the keys that are null in this row.

    A column of parquet has one type, so that a key of some turn is null in all others.
    """
    return [
        {**{key: value for key, value in message.items() if value is not None}, "content": text_of(message)}
        for message in messages
    ]
