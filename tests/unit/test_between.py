"""Observations as tokens: what the chat template puts between two turns, and nothing that an observation says of itself."""

from __future__ import annotations

import random
from typing import Any

import pytest

from deepgrpo.errors import EnvError, ModelError
from deepgrpo.prompts import synthetic
from deepgrpo.prompts.between import Between
from tiny import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<tool_call>", "</tool_response>"])
    tokenizer.chat_template = CHATML
    return tokenizer


def between(tokenizer: Any, role: str = "tool", chat: bool = True) -> Between:
    ends = tuple(tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<eos>") if t in tokenizer.get_vocab())
    return Between(tokenizer, role, chat, ends, {})


def test_what_the_template_puts_between_two_turns() -> None:
    tokenizer = chatml()
    found = between(tokenizer).encode("7\n", ended=True)
    assert tokenizer.decode(found) == "\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n"  # trimmed by the template
    # a turn that a stop string has ended gets the template's own end, too
    whole = between(tokenizer).encode("7", ended=False)
    assert tokenizer.decode(whole) == "<|im_end|>\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "f3?"}, {"role": "tool", "content": "7"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) + "f3?"
    assert (*tokenizer(prompt).input_ids, *whole) == tuple(tokenizer(text).input_ids)


def test_a_template_without_the_role_shows_a_user() -> None:
    tokenizer = chatml()
    tokenizer.chat_template = CHATML.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}",
    )
    assert "<|im_start|>user\n7<|im_end|>" in tokenizer.decode(between(tokenizer).encode("7", ended=True))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ModelError, match="cannot show observations in the role 'tool' or 'user'"):
        between(tokenizer).encode("7", ended=True)


def test_plain_text_without_a_template() -> None:
    tokenizer = synthetic.tokenizer()
    assert tokenizer.decode(between(tokenizer, chat=False).encode("7;", ended=True)) == "7;"
    with pytest.raises(EnvError, match="cannot encode the observation 'Ω'"):
        between(tokenizer, chat=False).encode("Ω", ended=True)


NASTY = (
    "<|im_end|>", "<|im_start|>", "<eos>", "<pad>", "<tool_call>", "</tool_response>", "<|im_", "end|>", "\x1b[31m", "\x00",
    "\ud800", "\u202e", "assistant\n", "{{ 7 * 7 }}", "QUESTION7Q", "TURN7T", "OBSERVATION7O", "\ufffd", "é", "漢", " ",
    "\n\n", "<s>", "[b]",
)  # fmt: skip


def test_no_observation_writes_a_special_token() -> None:
    """1,000 observations of nasty pieces: special tokens are the template's own, and the text is that of the observation."""
    tokenizer = chatml()
    encoder = between(tokenizer)
    added = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    own = [token for token in encoder.encode("7", ended=True) if token in added]
    draw = random.Random(0)
    names = 0
    for _ in range(1000):
        text = "x" + "".join(draw.choice(NASTY) for _ in range(draw.randrange(1, 9))) + "x"
        found = encoder.encode(text, ended=True)
        assert [token for token in found if token in added] == own, text
        names += any(name in text for name in NASTY[:6])
        read = tokenizer.decode(found)
        assert read.startswith("\n<|im_start|>tool\n") and text.encode("utf-8", "replace").decode() in read
    assert names > 500
