"""Rendering of questions: wording, chat template, tokens.

    question ─► user turn (preset or custom) ─► chat template, or the plain turn ─► tokens
    messages ─► the same for their last user turn; template.system in place of their system turn
    template.examples ─► turns behind the system turn

`build_renderer` binds the template of a recipe to a tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepgrpo.config import TemplateConfig
from deepgrpo.config.placeholders import QUESTION, Placeholder, placeholders
from deepgrpo.errors import ModelError, first_line
from deepgrpo.prompts.filling import fill, value_of
from deepgrpo.prompts.messages import SYSTEM_ROLES, Message, last_user, with_texts
from deepgrpo.prompts.tool_prompt import shows_tools, tool_prompt

Tools = Sequence[Mapping[str, Any]] | None
"""JSON schemas of tools, which the chat template writes into the prompt; None: no tools."""

_GSM8K = ' Let\'s think step by step and output the final answer after "####".'
_MATH = " Let's think step by step and output the final answer within \\boxed{}."


def user_turn(question: str, template: TemplateConfig, columns: Mapping[str, Any] | None = None) -> str:
    r"""User turn: the question in the wording of the template.

    A custom turn may also contain columns of the row, nested ones by their path: `What is {metadata.expression}?`; see
    `config.placeholders`. A placeholder without a value stays as it is.

    >>> user_turn("1 + 1?", TemplateConfig(preset="gsm8k"))
    '1 + 1? Let\'s think step by step and output the final answer after "####".'
    """
    if template.preset == "gsm8k":
        return question + _GSM8K
    if template.preset == "math":
        return question + _MATH
    if template.preset == "custom":
        assert template.user is not None  # TemplateConfig refuses it
        return fill(template.user, known_columns(question, columns))
    return question


def known_columns(question: str, columns: Mapping[str, Any] | None) -> dict[str, Any]:
    """Values for the placeholders of a template: the columns of the row, and the question as `question`."""
    return {**(columns or {}), QUESTION: question}


@dataclass(frozen=True, slots=True)
class Renderer:
    """Template bound to a tokenizer; created by `build_renderer`."""

    template: TemplateConfig
    tokenizer: Any
    chat: bool
    """True if the chat template is used: requested by the recipe and present in the tokenizer."""
    tools: Tools = None

    @property
    def placeholders(self) -> tuple[Placeholder, ...]:
        """The placeholders of both turns."""
        return tuple(dict.fromkeys([*placeholders(self.template.user), *placeholders(self.template.system)]))

    def lacks(self, question: str, columns: Mapping[str, Any]) -> list[Placeholder]:
        """The placeholders for which a row has no value: no such column, or null."""
        known = known_columns(question, columns)
        return [each for each in self.placeholders if value_of(known, each.name) is None]

    def text(
        self, question: str, columns: Mapping[str, Any] | None = None, messages: Sequence[Message] = ()
    ) -> str:
        """Render the model's input.

        Args:
            question: the question, or the text of the last user turn of `messages`.
            columns: the row, for placeholders.
            messages: the prompt as messages, if the row has it so.

        Messages end with the generation prompt, unless their last turn is the assistant's: the model then goes on with it.
        Without a chat template, the texts of the turns are joined by blank lines.

        Raises ModelError if the chat template rejects the turns.
        """
        turns = self.turns(question, columns, messages)
        if not self.chat:
            return "\n\n".join(turn["content"] for turn in turns)
        goes_on = turns[-1]["role"] == "assistant"
        how = {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
        shown = {"tools": list(self.tools)} if self.tools else {}
        try:
            return str(
                self.tokenizer.apply_chat_template(turns, tokenize=False, **how, **shown, **self.template.chat_template_kwargs)
            )
        except Exception as error:  # templates are Jinja programs and may raise anything
            remedy = "remove template.system or " if self.template.system is not None else ""
            raise ModelError(
                f"the chat template of {_name(self.tokenizer)} cannot render the turns "
                f"{[turn['role'] for turn in turns]}: {error}; {remedy}set template.chat = false"
            ) from error

    def turns(
        self, question: str, columns: Mapping[str, Any] | None = None, messages: Sequence[Message] = ()
    ) -> list[dict[str, Any]]:
        """The turns that are rendered, with texts as contents."""
        turn, system = user_turn(question, self.template, columns), self.template.system
        turns: list[dict[str, Any]] = [{"role": "user", "content": turn}]
        if messages:
            turns = with_texts(messages)
            turns[last_user(turns)]["content"] = turn
        told = [tool_prompt(self.tools)] if self.tools and self.chat and not shows_tools(self.tokenizer) else []
        examples = [turn.model_dump() for turn in self.template.examples]
        first, rest = (turns[:1], turns[1:]) if turns[0]["role"] in SYSTEM_ROLES else ([], turns)
        if system is not None or told:
            own = [turn["content"] for turn in first] if system is None else [fill(system, known_columns(question, columns))]
            first = [{"role": "system", "content": "\n\n".join([*own, *told])}]
        return [*first, *examples, *rest]

    def tokenize(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Tokenize rendered texts.

        A chat template contains its own BOS, so chat text gets no special tokens. Plain text gets the tokenizer's own
        special tokens, except a final EOS, which would end the text before the response.

        Raises ModelError if the tokenizer fails, mostly because it has no token for a character.
        """
        if not texts:
            return []
        try:
            rows = self.tokenizer(list(texts), add_special_tokens=not self.chat)["input_ids"]
        except Exception as error:
            if "UNK" not in str(error):
                raise ModelError(
                    f"{_name(self.tokenizer)} fails on {texts[0][:60]!r} (or a prompt read with it): "
                    f"{type(error).__name__}: {first_line(error)}; repair the tokenizer or the data"
                ) from error
            raise ModelError(
                f"{_name(self.tokenizer)} has no token for some character of {texts[0][:60]!r} (or a prompt read with "
                'it); a tokenizer over the characters of the synthetic task needs template.preset = "plain"'
            ) from error
        eos = getattr(self.tokenizer, "eos_token_id", None)
        if not self.chat and eos is not None:
            rows = [row[:-1] if row and row[-1] == eos and not text.endswith(self.tokenizer.eos_token) else row
                    for row, text in zip(rows, texts, strict=True)]  # fmt: skip
        return [tuple(row) for row in rows]


def build_renderer(
    template: TemplateConfig, tokenizer: Any, *, plain_if_no_template: bool = False, tools: Tools = None
) -> Renderer:
    """Bind a template to a tokenizer.

    Args:
        template: the section `data.template`.
        tokenizer: a transformers tokenizer.
        plain_if_no_template: where `template.chat` is not set, a tokenizer without a chat template gets plain text. Only the
            synthetic task sets it, whose own tokenizer has none.
        tools: schemas of the environment's tools, for the chat template.

    Raises ModelError if a requested chat template is missing, or has no variable of a name in `chat_template_kwargs`.
    """
    has_one = bool(getattr(tokenizer, "chat_template", None))
    if has_one:
        _refuse_unknown(template, tokenizer)
    if template.chat is False or has_one:
        return Renderer(template, tokenizer, template.chat is not False, tools)
    if plain_if_no_template and template == template.model_copy(update=_UNSET):
        return Renderer(template, tokenizer, False)
    reasons = ["template.chat is true"] if template.chat or not plain_if_no_template else []
    reasons += ["template.system is set"] if template.system is not None else []
    reasons += ["template.chat_template_kwargs is set"] if template.chat_template_kwargs else []
    raise ModelError(
        f"{' and '.join(reasons)}, but {_name(tokenizer)} has no chat template; set template.chat = false"
        f"{' and remove template.system' if template.system is not None else ''}, or use an instruction-tuned model"
    )


_UNSET: dict[str, Any] = {"chat": None, "system": None, "chat_template_kwargs": {}}
"""Keys of a template that ask for a chat template."""


def _refuse_unknown(template: TemplateConfig, tokenizer: Any) -> None:
    """Raise ModelError for a variable that the chat template never reads: it would change nothing, without a word."""
    source = tokenizer.chat_template  # a text, or several by name
    text = "\n".join(source.values()) if isinstance(source, Mapping) else str(source)
    for name in template.chat_template_kwargs:
        if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text):
            raise ModelError(
                f"template.chat_template_kwargs has {name!r}, which the chat template of {_name(tokenizer)} never reads; "
                "correct the name or remove it"
            )


def _name(tokenizer: Any) -> str:
    return f"the tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__!r}"
