"""Section `data.template`: the text around a question that makes it a prompt."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from deepgrpo.config.base import Section
from deepgrpo.config.placeholders import placeholders

_OWN_KWARGS = (
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages", "padding",
    "return_dict", "return_tensors", "tokenize", "truncation",
)  # fmt: skip
"""Arguments of `apply_chat_template` that rendering sets itself, or that change what it returns."""


class ExampleTurn(Section):
    """A turn of a worked example."""

    role: str
    """Role in the chat template, such as "user", "assistant" or "tool"."""
    content: str
    """Its text, shown as it stands."""


class TemplateConfig(Section):
    """Template that turns a question, or the last user turn of messages, into a prompt."""

    preset: Literal["plain", "gsm8k", "math", "custom"] = "plain"
    """plain: the question alone. gsm8k: asks for the answer after '####'. math: asks for \\boxed{}. custom: `user`."""
    user: str | None = None
    """For preset = "custom": the user turn, with {question} in place of the question. Other columns of the row can be named
    too, nested ones by their path ({metadata.expression}). {{name}} is the text {name}; braces of LaTeX are text."""
    system: str | None = None
    """System turn of the chat template; may name columns like `user`. It replaces the system turn of messages."""
    examples: tuple[ExampleTurn, ...] = ()
    """Turns before the question, behind the system turn: worked examples, such as { role = "user", content = "1 + 1?" }."""
    chat: bool | None = None
    """Apply the tokenizer's chat template; false: the user turn is the whole prompt. Default: true, except for the synthetic
    task with a tokenizer that has no chat template."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, e.g. {enable_thinking = false}."""

    @model_validator(mode="after")
    def _consistent(self) -> TemplateConfig:
        if self.preset == "custom" and self.user is None:
            raise ValueError(
                'template.preset is "custom", but template.user is missing; add the user turn with {question} in it'
            )
        if self.user is not None and self.preset != "custom":
            raise ValueError(
                f'template.user is {self.user!r}, but template.preset is "{self.preset}", which brings its own user '
                'turn; set template.preset = "custom" or remove template.user'
            )
        if self.user is not None and not placeholders(self.user):
            raise ValueError(
                f"template.user is {self.user!r} and has no {{question}}; write {{question}} where the question goes "
                "(or {column} for another column of the row)"
            )
        if self.system is not None and self.chat is False:
            raise ValueError(
                f"template.system is {self.system!r}, but template.chat is false and plain text has no system turn; "
                "move the text into template.user or set template.chat = true"
            )
        if self.chat_template_kwargs and self.chat is False:
            raise ValueError(
                f"template.chat_template_kwargs is {self.chat_template_kwargs!r}, but template.chat is false and no chat "
                "template is used; remove it or set template.chat = true"
            )
        if own := [name for name in self.chat_template_kwargs if name in _OWN_KWARGS]:
            raise ValueError(
                f"template.chat_template_kwargs has {own[0]!r}, which is set by the rendering itself; it takes the "
                "variables of the model's chat template, e.g. {enable_thinking = false}"
            )
        return self
