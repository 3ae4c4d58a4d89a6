r"""Tokens between two turns of the model: the environment's observation as the chat template shows it.

    ... "f3?" <|im_end|>  |  \n<|im_start|>tool\n 7 <|im_end|>\n<|im_start|>assistant\n  |  "f7?" ...
    sampled, never encoded   encoded here, once                                            sampled

What the model wrote is never encoded again, and an observation cannot write special tokens: `<|im_end|>` inside one becomes
the tokens of its characters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from deepgrpo.errors import EnvError, ModelError, first_line

_QUESTION, _TURN, _SHOWN = "QUESTION7Q", "TURN7T", "OBSERVATION7O"
"""Texts that stand for the contents in a rendering of the template."""


@dataclass(frozen=True)
class Between:
    """Encodes observations for one tokenizer.

    Args:
        role: role of an observation; "user" where the template does not know it.
        chat: whether the chat template is used. Without it, an observation is its plain text.
        eos_ids: tokens that end a turn.
        variables: further variables of the chat template.
    """

    tokenizer: Any
    role: str
    chat: bool
    eos_ids: tuple[int, ...]
    variables: Mapping[str, Any]

    def encode(self, observation: str, *, ended: bool) -> tuple[int, ...]:
        """Tokens of an observation and of what the template puts around it, up to the model's next turn.

        Args:
            ended: the turn's last token is one that ends turns, so that the template's own is left out.

        Raises EnvError if the tokenizer has no token for some of its text.
        """
        text = observation.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
        head, tail = self._around
        if ended and (end := next((end for end in self._ends if head.startswith(end)), None)):
            head = head.removeprefix(end)
        if self.chat:
            text = self._as_shown(text)
        try:
            return self._tokens(head, text, tail)
        except Exception as error:  # the library raises bare Exception for an unknown character
            raise EnvError(
                f"the tokenizer cannot encode the observation {text[:60]!r} ({first_line(error)}); let the environment answer "
                "in characters of its vocabulary"
            ) from error

    def _tokens(self, head: str, text: str, tail: str) -> tuple[int, ...]:
        whole = self._encode(head + text + tail)
        before, after = self._fixed(head), self._fixed(tail)
        fixed = [token for token in (*before, *after) if token in self._added]
        if [token for token in whole if token in self._added] == fixed:
            return tuple(whole)
        # the text has the name of a token: cut the name in two, so that its characters are encoded
        pieces = [self._encode(piece) for piece in _cut(text, self._names)]
        special = {*getattr(self.tokenizer, "all_special_ids", ())} - {getattr(self.tokenizer, "unk_token_id", None)}
        plain = [token for piece in pieces for token in piece if token not in special]
        return (*before, *plain, *after)

    def _fixed(self, text: str) -> tuple[int, ...]:
        """Tokens of a text of the template."""
        if text not in self._known:
            self._known[text] = tuple(self._encode(text))
        return self._known[text]

    @cached_property
    def _known(self) -> dict[str, tuple[int, ...]]:
        return {}

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    @cached_property
    def _added(self) -> frozenset[int]:
        """Tokens that are no text: special ones, and others that a template or a model's format has added."""
        added: dict[str, int] = getattr(self.tokenizer, "get_added_vocab", dict)()
        return frozenset({*added.values(), *getattr(self.tokenizer, "all_special_ids", ())})

    @cached_property
    def _names(self) -> tuple[str, ...]:
        added: dict[str, int] = getattr(self.tokenizer, "get_added_vocab", dict)()
        return tuple({*added, *getattr(self.tokenizer, "all_special_tokens", ())})

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return tuple(self.tokenizer.decode([token]) for token in self.eos_ids)

    @cached_property
    def _around(self) -> tuple[str, str]:
        """Text before and after an observation; both empty without a chat template."""
        if not self.chat:
            return "", ""
        before, found, after = self._between(_SHOWN).partition(_SHOWN)
        assert found  # `_shown_as` has tried it
        return before, after

    def _as_shown(self, text: str) -> str:
        """The observation as the template writes it: some strip it, some write it as JSON."""
        head, tail = self._around
        shown = self._between(text)
        fits = shown.startswith(head) and shown.endswith(tail) and len(shown) >= len(head) + len(tail)
        return shown[len(head) : len(shown) - len(tail)] if fits else text

    def _between(self, observation: str) -> str:
        return self._render(self._shown_as, observation)

    @cached_property
    def _shown_as(self) -> str:
        """The role in which the template shows observations. Raises ModelError if it shows them in none."""
        reason = "it leaves them out"
        for role in dict.fromkeys((self.role, "user")):
            try:
                if _SHOWN in self._render(role, _SHOWN):
                    return role
            except Exception as error:  # templates are Jinja programs and may raise anything
                reason = first_line(error)
        raise ModelError(
            f"the chat template cannot show observations in the role {self.role!r} or 'user' ({reason}); set "
            "template.chat = false"
        )

    def _render(self, role: str, observation: str) -> str:
        """Text that the template writes after a turn of the model."""
        turns = [
            {"role": "user", "content": _QUESTION},
            {"role": "assistant", "content": _TURN},
            {"role": role, "content": observation},
        ]
        text = str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **self.variables))
        return text.partition(_TURN)[2]


def _cut(text: str, names: Sequence[str]) -> list[str]:
    """Pieces of a text, none of which contains one of these names, as far as a name has two characters.

    >>> _cut("a<|end|>b", ["<|end|>"])
    ['a<', '|end|>b']
    """
    pieces: list[str] = []
    long = [name for name in names if len(name) > 1]
    pattern = re.compile("|".join(map(re.escape, sorted(long, key=len, reverse=True)))) if long else None
    start = at = 0
    while pattern and (found := pattern.search(text, at)):
        pieces.append(text[start : found.start() + 1])
        start = at = found.start() + 1
    return [*pieces, text[start:]]
