"""From a question to tokens."""

from __future__ import annotations

import pytest

from deepgrpo.config import TemplateConfig, parse_config
from deepgrpo.errors import ConfigError, ModelError
from deepgrpo.prompts import synthetic
from deepgrpo.prompts.chat import build_renderer, user_turn

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def letters(chat_template: str | None = None, adds: str = ""):
    """A character tokenizer for printable ASCII; `adds` is the special token that it puts around plain text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<bos>": 0, "<eos>": 1, **{chr(i): i for i in range(32, 127)}, "\n": 10}
    core = Tokenizer(models.WordLevel(vocabulary))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    if adds:
        core.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<bos>", 0), ("<eos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = chat_template
    return tokenizer


EXAMPLES = [{"role": "user", "content": "1 + 1 = {x}?"}, {"role": "assistant", "content": "2"}]


def test_examples_stand_between_the_system_turn_and_the_question():
    renderer = build_renderer(TemplateConfig(examples=EXAMPLES), letters(TEMPLATE))
    shown = "<user>1 + 1 = {x}?</user><assistant>2</assistant>"
    assert renderer.text("Why?") == f"{shown}<user>Why?</user><assistant>"
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert renderer.text("Why?", messages=own) == f"<system>Be brief.</system>{shown}<user>Why?</user><assistant>"
    both = build_renderer(TemplateConfig(system="Be kind.", examples=EXAMPLES), letters(TEMPLATE))
    assert both.text("Why?", messages=own) == f"<system>Be kind.</system>{shown}<user>Why?</user><assistant>"
    plain = build_renderer(TemplateConfig(chat=False, examples=EXAMPLES), letters())
    assert plain.text("Why?") == "1 + 1 = {x}?\n\n2\n\nWhy?"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (TemplateConfig(), "Why?"),
        (
            TemplateConfig(preset="gsm8k"),
            'Why? Let\'s think step by step and output the final answer after "####".',
        ),
        (
            TemplateConfig(preset="math"),
            "Why? Let's think step by step and output the final answer within \\boxed{}.",
        ),
        (TemplateConfig(preset="custom", user="{question} Use {x} \\boxed{}."), "Why? Use {x} \\boxed{}."),
    ],
)
def test_presets(template: TemplateConfig, text: str):
    assert user_turn("Why?", template) == text


def test_a_question_full_of_braces_stays_as_it_is():
    assert (
        user_turn("{a} {question} %s", TemplateConfig(preset="custom", user="Q: {question}")) == "Q: {a} {question} %s"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"preset": "custom"}, "template.user is missing; add the user turn"),
        ({"preset": "custom", "user": "no slot"}, "'no slot' and has no {question}; write {question}"),
        ({"preset": "math", "user": "{question}"}, 'template.preset is "math", which brings its own user turn'),
        ({"chat": False, "system": "Be brief."}, "template.chat is false and plain text has no system turn"),
    ],
)
def test_templates_that_contradict_themselves_are_refused(template: dict, message: str):
    raw = {
        "model": {"type": "pretrained", "path": "m"},
        "data": {"type": "jsonl", "path": "d", "template": template},
        "reward": {"type": "math"},
    }
    with pytest.raises(ConfigError) as error:
        parse_config(raw)
    assert message in str(error.value)


def test_chat_text_is_tokenized_without_further_special_tokens():
    renderer = build_renderer(TemplateConfig(system="Be brief."), letters(TEMPLATE, adds="<bos> $A <eos>"))
    text = renderer.text("1+1?")
    assert text == "<system>Be brief.</system><user>1+1?</user><assistant>"
    assert renderer.tokenize([text]) == [tuple(map(ord, text))]


def test_plain_text_gets_the_tokenizers_bos_but_no_eos():
    renderer = build_renderer(TemplateConfig(chat=False), letters(TEMPLATE, adds="<bos> $A <eos>"))
    assert renderer.text("1+1?") == "1+1?"
    assert renderer.tokenize(["1+1?", "a"]) == [(0, *map(ord, "1+1?")), (0, ord("a"))]
    assert renderer.tokenize([]) == []


def test_no_chat_template_is_an_error_except_for_the_synthetic_task():
    with pytest.raises(ModelError, match=r"has no chat template; set template.chat = false"):
        build_renderer(TemplateConfig(), letters())
    assert build_renderer(TemplateConfig(), letters(), plain_if_no_template=True).text("3+4:") == "3+4:"
    with pytest.raises(ModelError, match=r"template.chat is true and template.system is set, but"):
        build_renderer(TemplateConfig(system="S"), letters())
    with pytest.raises(ModelError, match=r"^template.system is set, but"):
        build_renderer(TemplateConfig(system="S"), letters(), plain_if_no_template=True)


def test_a_chat_template_that_was_asked_for_is_an_error_also_for_the_synthetic_task():
    with pytest.raises(ModelError, match=r"^template.chat is true, but .* has no chat template; set template.chat = false"):
        build_renderer(TemplateConfig(chat=True), letters(), plain_if_no_template=True)
    assert build_renderer(TemplateConfig(chat=True), letters(TEMPLATE), plain_if_no_template=True).chat
    assert not build_renderer(TemplateConfig(chat=False), letters(TEMPLATE), plain_if_no_template=True).chat


def test_a_template_that_refuses_the_turns_says_so():
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    renderer = build_renderer(TemplateConfig(system="S"), letters(refusing))
    with pytest.raises(ModelError, match=r"\['system', 'user'\]: System role not supported; remove template.system"):
        renderer.text("Why?")


def test_characters_without_a_token_are_named():
    renderer = build_renderer(TemplateConfig(), synthetic.tokenizer(), plain_if_no_template=True)
    with pytest.raises(ModelError, match="no token for some character of 'What"):
        renderer.tokenize(["What is 3+4?"])


def test_a_custom_turn_can_name_columns() -> None:
    template = TemplateConfig(preset="custom", user="What is {metadata.expression}? \\boxed{} {nothing}")
    columns = {"metadata": {"expression": "4 - {question}"}, "question": "no"}
    # what is filled in is not read again, and unknown names stay
    assert user_turn("4 - 1 =", template, columns) == "What is 4 - {question}? \\boxed{} {nothing}"
    # a column of the same name does not replace the question: `data.columns.question` may name another one
    assert user_turn("4 - 1 =", TemplateConfig(preset="custom", user="{question}"), {"question": "raw"}) == "4 - 1 ="
