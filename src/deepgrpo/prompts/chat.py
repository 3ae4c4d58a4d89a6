"""Rendering of questions: wording, chat template, tokens.

    question ─► user turn (preset or custom) ─► chat template, or the plain turn ─► tokens

`build_renderer` binds the template of a recipe to a tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepgrpo.config import TemplateConfig
from deepgrpo.config.placeholders import QUESTION, Placeholder, placeholders
from deepgrpo.errors import ModelError, first_line
from deepgrpo.prompts.filling import fill, value_of

_GSM8K = ' Let\'s think step by step and output the final answer after "####".'
_MATH = " Let's think step by step and output the final answer within \\boxed{}."


def user_turn(question: str, template: TemplateConfig, columns: Mapping[str, Any] | None = None) -> str:
    r"""User turn: the question in the wording of the template.

    A custom turn may also contain columns of the row, nested ones with dots: `What is {metadata.expression}?`; see
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

    @property
    def placeholders(self) -> tuple[Placeholder, ...]:
        """The placeholders of both turns."""
        return tuple(dict.fromkeys([*placeholders(self.template.user), *placeholders(self.template.system)]))

    def lacks(self, question: str, columns: Mapping[str, Any]) -> list[Placeholder]:
        """The placeholders for which a row has no value: no such column, or null."""
        known = known_columns(question, columns)
        return [each for each in self.placeholders if value_of(known, each.name) is None]

    def text(self, question: str, columns: Mapping[str, Any] | None = None) -> str:
        """Render the model's input. Raises ModelError if the chat template rejects the turns."""
        turn = user_turn(question, self.template, columns)
        if not self.chat:
            return turn
        system = self.template.system
        if system is not None:
            system = fill(system, known_columns(question, columns))
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": turn})
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # templates are Jinja programs and may raise anything
            remedy = "remove template.system or " if system is not None else ""
            raise ModelError(
                f"the chat template of {_name(self.tokenizer)} cannot render the turns "
                f"{[message['role'] for message in messages]}: {error}; {remedy}set template.chat = false"
            ) from error

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


def build_renderer(template: TemplateConfig, tokenizer: Any, *, plain_if_no_template: bool = False) -> Renderer:
    """Bind a template to a tokenizer.

    Args:
        template: the section `data.template`.
        tokenizer: a transformers tokenizer.
        plain_if_no_template: where `template.chat` is not set, a tokenizer without a chat template gets plain text. Only the
            synthetic task sets it, whose own tokenizer has none.

    Raises ModelError if a requested chat template is missing.
    """
    has_one = bool(getattr(tokenizer, "chat_template", None))
    if template.chat is False or has_one:
        return Renderer(template, tokenizer, template.chat is not False)
    if plain_if_no_template and template.chat is None and template.system is None:
        return Renderer(template, tokenizer, False)
    reasons = ["template.chat is true"] if template.chat or not plain_if_no_template else []
    reasons += ["template.system is set"] if template.system is not None else []
    raise ModelError(
        f"{' and '.join(reasons)}, but {_name(tokenizer)} has no chat template; set template.chat = false"
        f"{' and remove template.system' if template.system is not None else ''}, or use an instruction-tuned model"
    )


def _name(tokenizer: Any) -> str:
    return f"the tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__!r}"
