"""Prompts as messages: rendered by the model's own chat template, token by token; nested columns; what rewards receive."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from trees import make_tree

from deepgrpo.config import ColumnMap, JsonlData, TemplateConfig, UserReward
from deepgrpo.errors import ConfigError, DataError, ModelError
from deepgrpo.prompts.chat import build_renderer
from deepgrpo.prompts.messages import with_texts
from deepgrpo.prompts.paths import MISSING, nearest, paths_of, value_at
from deepgrpo.prompts.source import PromptSource, build_source
from deepgrpo.records import Prompt
from deepgrpo.rewards import build_reward
from deepgrpo.runs.trees import tree_from_json, tree_to_json
from tiny import byte_tokenizer, write_jsonl

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1 + 1?"}
ANSWER = {"role": "assistant", "content": "2"}
AGAIN = {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "2 + 2?"}]}
TALK = [SYSTEM, USER, ANSWER, AGAIN]
PARTS = {
    "one turn": ("1 + 1?", [USER]), "system": ("1 + 1?", [SYSTEM, USER]), "several turns": ("And 2 + 2?", TALK),
    "parts of text": ("And 2 + 2?", [AGAIN]), "null keys": ("1 + 1?", [{**USER, "name": None, "tool_calls": None}]),
}  # fmt: skip
VERL = {
    "data_source": "gsm8k", "prompt": [SYSTEM, USER], "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"index": 7, "question": "1 + 1?"},
}  # fmt: skip
COLUMNS = {"question": "prompt", "answer": "reward_model.ground_truth", "id": "extra_info.index"}


def source_of(place: Path, rows: list[dict[str, Any]], columns: dict[str, Any], **template: Any) -> PromptSource:
    data = JsonlData(
        path=write_jsonl(place / "d.jsonl", rows), columns=ColumnMap(**columns), template=TemplateConfig(**template)
    )
    return build_source(data, byte_tokenizer(), seed=0, context=4096, shuffle=False)


def only(place: Path, prompt: Any, columns: dict[str, Any] | None = None, **template: Any) -> Prompt:
    row = {"prompt": prompt, "answer": "2", "level": "easy"}
    return source_of(place, [row], {"question": "prompt", **(columns or {})}, **template).head(1)[0]


# ---------------------------------------------------------------- rendering


def published(name: str) -> str:
    """A published model's chat template, as TRL ships it."""
    found = find_spec("trl")
    assert found is not None and found.origin is not None
    return (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", ["qwen2_5", "qwen3", "llama3_2", "gemma3", "phi3"])
@pytest.mark.parametrize("talk", PARTS)
def test_messages_are_rendered_as_the_models_tokenizer_renders_them(model: str, talk: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, tokenizer.bos_token = published(model), "<eos>"
    question, messages = PARTS[talk]
    plain = [{"role": turn["role"], "content": question if turn is AGAIN else turn["content"]} for turn in messages]
    expected = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=True)["input_ids"]
    renderer = build_renderer(TemplateConfig(), tokenizer)
    assert renderer.tokenize([renderer.text(question, {}, messages)]) == [tuple(expected)]


def test_variables_of_the_chat_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = published("qwen3")
    off = build_renderer(TemplateConfig(chat_template_kwargs={"enable_thinking": False}), tokenizer)
    assert off.text("Why?").endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert off.text("Why?") == tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert build_renderer(TemplateConfig(), tokenizer).text("Why?").endswith("<|im_start|>assistant\n")
    with pytest.raises(
        ModelError, match=r"has 'thinking', which the chat template of .* never reads; correct the name"
    ):
        build_renderer(TemplateConfig(chat_template_kwargs={"thinking": False}), tokenizer)


def test_variables_without_a_chat_template_are_refused() -> None:
    with pytest.raises(ValueError, match=r"template.chat is false and no chat template is used"):
        TemplateConfig(chat=False, chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(ValueError, match="has 'add_generation_prompt', which is set by the rendering itself"):
        TemplateConfig(chat_template_kwargs={"add_generation_prompt": False})
    bare = byte_tokenizer()
    bare.chat_template = None
    with pytest.raises(ModelError, match=r"template.chat_template_kwargs is set, but .* has no chat template"):
        build_renderer(TemplateConfig(chat_template_kwargs={"x": 1}), bare, plain_if_no_template=True)


def test_a_wording_goes_to_the_last_user_turn_and_a_system_turn_replaces_that_of_the_row(tmp_path: Path) -> None:
    prompt = only(tmp_path, TALK, preset="custom", user="{question} ({level})", system="Level {level}.")
    assert prompt.text == (
        "<|system|>Level easy.\n<|user|>1 + 1?\n<|assistant|>2\n<|user|>And 2 + 2? (easy)\n<|assistant|>"
    )
    assert (prompt.question, prompt.messages, prompt.columns["prompt"]) == ("And 2 + 2?", tuple(TALK), TALK)
    assert only(tmp_path, [USER], system="Be quick.").text == "<|system|>Be quick.\n<|user|>1 + 1?\n<|assistant|>"
    assert only(tmp_path, TALK).text.startswith("<|system|>Be brief.\n<|user|>1 + 1?\n")


def test_without_a_chat_template_the_turns_are_joined(tmp_path: Path) -> None:
    assert only(tmp_path, [USER], chat=False).text == "1 + 1?"
    assert only(tmp_path, TALK, chat=False).text == "Be brief.\n\n1 + 1?\n\n2\n\nAnd 2 + 2?"
    bare = byte_tokenizer()
    bare.chat_template = None
    with pytest.raises(ModelError, match=r"has no chat template; set template.chat = false"):
        build_renderer(TemplateConfig(), bare)


def test_messages_that_end_with_an_assistant_turn(tmp_path: Path) -> None:
    talk = [USER, {"role": "assistant", "content": "The sum is"}]
    with pytest.raises(
        DataError, match=r"line 1, column 'prompt': the messages end with an assistant turn.*last_assistant to .drop"
    ):
        only(tmp_path, talk)
    dropped = only(tmp_path, talk, {"last_assistant": "drop"})
    assert (dropped.text, dropped.messages) == ("<|user|>1 + 1?\n<|assistant|>", (USER,))
    # CHAT ends a turn with a line break, which transformers cuts off
    assert only(tmp_path, talk, {"last_assistant": "continue"}).text == "<|user|>1 + 1?\n<|assistant|>The sum is"


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (
            [{"from": "human", "value": "1?"}],
            r"turn 0 of the messages has no role; its keys are from, value \(the form of ShareGPT",
        ),
        ([{"role": "user"}], r"the content of turn 0 \(user\) is missing"),
        ([{"role": "user", "content": 3}], r"the content of turn 0 \(user\) is a int"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            r"has a part that is no text \('image'\); models of text alone",
        ),
        ([SYSTEM], "the messages have no user turn"),
        ([USER, SYSTEM], "the messages end with a system turn"),
        ([["1?"]], "the question is a list .* to a column of texts or messages"),
    ],
)
def test_messages_that_are_no_prompt(tmp_path: Path, prompt: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        only(tmp_path, prompt)


def test_empty_messages_are_an_empty_question(tmp_path: Path) -> None:
    rows = [{"prompt": [], "answer": "1"}, {"prompt": [{"role": "user", "content": " "}], "answer": "1"}]
    rows += [{"prompt": [USER], "answer": "2"}]
    source = source_of(tmp_path, rows, {"question": "prompt"})
    assert (source.skipped, [p.id for p in source.head(9)]) == ({"empty question": 2}, ["3"])


def test_keys_that_are_null_are_left_out() -> None:
    """A template that asks `if m.name is defined` must not see the null that parquet puts into every turn."""
    assert with_texts([{**USER, "name": None, "weight": 0}]) == [{**USER, "weight": 0}]


def test_tool_calls_need_no_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    assert with_texts([call]) == [{"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}]


# ---------------------------------------------------------------- columns by path


def test_verls_columns(tmp_path: Path) -> None:
    source = source_of(tmp_path, [VERL], COLUMNS)
    (prompt,) = source.head(1)
    assert (prompt.id, prompt.question, prompt.answer, prompt.messages) == ("7", "1 + 1?", "2", (SYSTEM, USER))
    columns = {**COLUMNS, "question": "prompt.-1.content", "alternatives": "extra_info.others"}
    row = {**VERL, "extra_info": {"index": "x", "others": ["two"]}}
    (prompt,) = source_of(tmp_path, [row], columns).head(1)
    assert (prompt.id, prompt.question, prompt.accepted, prompt.messages) == ("x", "1 + 1?", ("2", "two"), ())


def test_a_template_names_columns_by_path(tmp_path: Path) -> None:
    source = source_of(
        tmp_path, [VERL], COLUMNS, preset="custom", user="{prompt.0.content} {prompt.-1.content} {ability}"
    )
    assert "<|user|>Be brief. 1 + 1? math" in source.head(1)[0].text
    with pytest.raises(
        ConfigError, match=r"\{reward_model.truth\}, which no row has; did you mean \{reward_model.ground_truth\}"
    ):
        source_of(tmp_path, [VERL], COLUMNS, preset="custom", user="{reward_model.truth}")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("a.b", 1), ("a.c.0", 2), ("a.c.-1", 3), ("a.c.2", MISSING), ("a.c.-3", MISSING), ("a.c.x", MISSING), ("a.d", MISSING),
        ("x.y", "own name"), ("x.y.z", "behind a name with a dot"), ("x.w", "nested"), ("n", None), ("a.b.c", MISSING),
    ],
)  # fmt: skip
def test_values_at_paths(path: str, value: Any) -> None:
    row = {
        "a": {"b": 1, "c": [2, 3]},
        "x.y": "own name",
        "x": {"y": {"z": "behind a name with a dot"}, "w": "nested"},
        "n": None,
    }
    assert value_at(row, path) == value


def test_a_column_with_a_dot_in_its_name_is_still_one(tmp_path: Path) -> None:
    row = {"q.text": "1 + 1?", "answer": "2", "q": {"text": "other"}}
    assert source_of(tmp_path, [row], {"question": "q.text"}).head(1)[0].question == "1 + 1?"


def test_a_missing_path_lists_what_there_is(tmp_path: Path) -> None:
    assert list(paths_of(VERL))[:6] == [
        "data_source",
        "prompt",
        "prompt.0",
        "prompt.0.role",
        "prompt.0.content",
        "prompt.-1",
    ]
    assert nearest("ground_truth", list(paths_of(VERL))) == "reward_model.ground_truth"
    with pytest.raises(
        DataError, match=r"no column 'question' \(the question\); did you mean 'prompt'\? Its columns are data_s"
    ):
        source_of(tmp_path, [VERL], {})
    says = (
        r"line 1 has no column 'reward.ground_truth' \(the answer\); did you mean 'reward_model.ground_truth'\? Its columns "
        r"are data_source, prompt, .* reward_model.style, reward_model.ground_truth, .*; set data.columns.answer to one of them"
    )
    with pytest.raises(DataError, match=says):
        source_of(tmp_path, [VERL], {"question": "prompt", "answer": "reward.ground_truth"})


# ---------------------------------------------------------------- rewards and saved trees

FUNCTION = """
def seen(prompts, completions, prompt, **columns):
    assert prompts == {prompts}, prompts
    assert completions == {completions}, completions
    prompts[0] = prompt[0] = None
    return [1.0] * len(prompts)
"""


@pytest.mark.parametrize("form", ["auto", "messages", "text"])
def test_a_reward_of_trls_form_receives_the_messages(tmp_path: Path, form: str) -> None:
    """As TRL 1.16: a conversational prompt as it is in the data, its completion as one assistant turn."""
    prompt = only(tmp_path, [SYSTEM, USER], preset="math")
    seen: Any = [[SYSTEM, USER]] if form != "text" else [prompt.text]
    said: Any = [[{"role": "assistant", "content": "2!"}]] if form != "text" else ["2!"]
    (tmp_path / "mine.py").write_text(FUNCTION.format(prompts=seen, completions=said))
    reward = build_reward(UserReward(function=f"{tmp_path / 'mine.py'}:seen", format=form))  # type: ignore[arg-type]
    assert [score.value for score in reward.score([prompt], ["2!"], [(1,)])] == [1.0]
    reward.close()
    assert prompt.messages == (SYSTEM, USER)  # the function changed its own copy


def test_a_question_stays_a_text_for_a_reward(tmp_path: Path) -> None:
    prompt = only(tmp_path, "1 + 1?")
    (tmp_path / "mine.py").write_text(FUNCTION.format(prompts=[prompt.text], completions=["2!"]))
    reward = build_reward(UserReward(function=f"{tmp_path / 'mine.py'}:seen"))
    assert reward.score([prompt], ["2!"], [(1,)])[0].value == 1.0
    reward.close()


def test_a_saved_tree_keeps_the_messages(tmp_path: Path) -> None:
    tree = make_tree([(2, 0.0), (2, 1.0)])
    prompt = only(tmp_path, TALK)
    saved, _ = tree_from_json(tree_to_json(replace(tree, prompt=prompt), []))
    assert (saved.prompt.question, saved.prompt.messages) == ("And 2 + 2?", tuple(TALK))
