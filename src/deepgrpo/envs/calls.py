"""Calls of tools in a turn of the model: by the response parser of the chat template, else in the Hermes form.

    <tool_call>{"name": "search", "arguments": {"query": "Ada Lovelace"}}</tool_call>

A turn without a call is the last one. What cannot be read is a `Malformed`, whose text tells the model how to write it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from deepgrpo.errors import ModelError, first_line
from deepgrpo.prompts.tool_prompt import CLOSE, FORM, OPEN

_LONGEST = 100_000
"""Characters of a call; more are not parsed."""


@dataclass(frozen=True, slots=True)
class Call:
    """Example: Call("search", '{"query": "Ada Lovelace"}')."""

    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """A call that cannot be read. Example: Malformed("its arguments are no JSON object")."""

    said: str


Parser = Callable[[str], list[Call | Malformed]]
"""Turn of the model → its calls in order; empty if it asks for nothing."""


def build_parser(tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> Parser:
    """The parser of a model: its tokenizer's `response_template` where it has one, else that of the Hermes form.

    Raises ModelError if the response template is no valid one.
    """
    if getattr(tokenizer, "response_template", None) is None:
        return hermes_calls
    parse = partial(tokenizer.parse_response, prefix=_turn_begins(tokenizer), tools=list(tools))
    try:
        parse("")
    except Exception as error:
        raise ModelError(
            f"the response_template of the tokenizer cannot be used ({first_line(error)}); correct it, or remove it from its "
            f"tokenizer_config.json for calls of the form {FORM}"
        ) from error
    return partial(_template_calls, parse)


def _turn_begins(tokenizer: Any) -> str:
    """Text that the chat template writes before a turn of the model; the parser needs it."""
    try:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True))
    except Exception:  # no template, or one that wants something else
        return ""


def hermes_calls(text: str) -> list[Call | Malformed]:
    """Calls between <tool_call> and </tool_call>; the last one may lack its end.

    >>> hermes_calls('So <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    [Call(name='add', arguments='{"a": 1}')]
    """
    found: list[Call | Malformed] = []
    _, opened, rest = text.partition(OPEN)
    while opened:
        content, _, rest = rest.partition(CLOSE)
        found.append(_read(content))
        _, opened, rest = rest.partition(OPEN)
    return found


def _template_calls(parse: Callable[[str], Mapping[str, Any]], text: str) -> list[Call | Malformed]:
    try:
        return [_checked(each.get("function", each)) for each in parse(text).get("tool_calls") or []]
    except Exception as error:  # a template is data, and the text may be anything
        return [Malformed(f"it cannot be read ({first_line(error)[:200]})")]


def _read(content: str) -> Call | Malformed:
    if len(content) > _LONGEST:
        return Malformed(f"it has {len(content):,} characters, more than {_LONGEST:,}")
    try:
        return _checked(json.loads(content, parse_constant=_refused))
    except (ValueError, RecursionError) as error:
        return Malformed(f"it is no valid JSON ({first_line(error)[:200]})")


def _checked(raw: Any) -> Call | Malformed:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
        return Malformed("it has no name")
    arguments = raw.get("arguments", {})
    if isinstance(arguments, str):  # JSON in a string, as OpenAI writes it
        try:
            arguments = json.loads(arguments, parse_constant=_refused)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        return Malformed("its arguments are no JSON object")
    return Call(raw["name"], json.dumps(dict(arguments)))


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
