"""Tools in words, for chat templates that show none: their schemas and the Hermes form of a call, in the system turn."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FORM = OPEN + '{"name": ..., "arguments": {...}}' + CLOSE


def shows_tools(tokenizer: Any) -> bool:
    """True if the chat template of a tokenizer reads the variable `tools`."""
    source = getattr(tokenizer, "chat_template", None) or ""  # a text, or several by name
    text = "\n".join(source.values()) if isinstance(source, Mapping) else str(source)
    return re.search(r"(?<![\w'\"])tools(?![\w'\"])", text) is not None


def tool_prompt(tools: Sequence[Mapping[str, Any]]) -> str:
    """Text that tells a model of its tools."""
    schemas = "\n".join(json.dumps(each, ensure_ascii=False) for each in tools)
    return (
        f"You can call these tools:\n<tools>\n{schemas}\n</tools>\nTo call one, write {FORM} and end your turn. "
        "You then read its result. When you need no tool, answer."
    )
