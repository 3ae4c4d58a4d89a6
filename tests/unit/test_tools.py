"""Tools: schemas, the forms of a call, limits of the workers, hostile results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepgrpo.config import TemplateConfig, ToolsEnv
from deepgrpo.envs.calls import Call, Malformed, build_parser, hermes_calls
from deepgrpo.envs.tools import ToolsEnvironment
from deepgrpo.errors import ConfigError, ModelError
from deepgrpo.prompts.between import Between
from deepgrpo.prompts.chat import build_renderer
from deepgrpo.records import Prompt
from deepgrpo.visible import visible
from tiny import byte_tokenizer

TOOLS = '''
import asyncio, os, random, time

print("\\x1b[2J loaded")
__counted = []

def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    print("\\x1b]0;owned\\x07 adding")
    return a + b

async def search(query: str) -> list[dict[str, str]]:
    """Search.

    Args:
        query: The words.
    """
    await asyncio.sleep(0)
    return [{"title": query.title()}]

def draw() -> float:
    """Draw a number."""
    return random.random()

def misbehave(how: str) -> str:
    """Do something wrong.

    Args:
        how: The way.
    """
    if how == "hang":
        time.sleep(60)
    if how == "exit":
        os._exit(3)
    if how == "quit":
        raise SystemExit(1)
    if how == "raise":
        raise ValueError("\\x1b[31m" + "no" * 9999)
    if how == "odd":
        class Odd(Exception):
            def __str__(self):
                raise RuntimeError
        raise Odd
    if how == "memory":
        return "x" * (3 << 30)
    if how == "long":
        return "y" * 1_000_000
    if how == "bytes":
        return b"\\xff\\xfeok"
    if how == "half":
        return "\\ud800 half"
    return None

SPECIAL = ["<|im_end|>", "<|im_start|>system\\n", "<tool_call>", "</tool_response>", "<eos>", "<pad>", "{{ 1/0 }}", "[/INST]"]
CONTROL = [chr(code) for code in [*range(32), 127, 155, 0x202e, 0x2066, 0xd800, 0xdfff, 0xfeff, 0xfffe, 0x1f600]]

def hostile(number: int) -> str:
    """Say something hostile.

    Args:
        number: Which of them.
    """
    draw = random.Random(number)
    if number % 250 == 0:
        return draw.choice(SPECIAL) * 100_000
    if number % 10 == 0:
        return draw.randbytes(200)
    words = [*SPECIAL, *CONTROL, "plain", " ", "\\x1b]52;c;cm0gLXJm\\x07", "\\x1b[2J"]
    return "".join(draw.choice(words) for _ in range(draw.randrange(1, 40)))
'''
NAMES = ["add", "search", "draw", "misbehave", "hostile"]
PROMPT = Prompt("p", "q", (1,), "q")


def asked(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolsEnvironment]:
    path = tmp_path_factory.mktemp("tools") / "my_tools.py"
    path.write_text(TOOLS)
    # no call here takes that long, however busy the machine is
    config = ToolsEnv(functions=f"{path}:[{', '.join(NAMES)}]", timeout_s=250.0, memory_mb=512, output_chars=500, workers=1)
    made = ToolsEnvironment.build(config, byte_tokenizer())
    yield made
    made.close()


def observe(environment: ToolsEnvironment, *texts: str) -> list[tuple[str, int, int]]:
    """Observation, calls and failed calls of each turn."""
    turns = environment.step_all([(environment.start(PROMPT), text) for text in texts])
    assert not any(turn.done for turn in turns)
    return [(turn.observation, turn.calls, turn.failed_calls) for turn in turns]


def test_schemas_come_from_types_and_docstrings(environment: ToolsEnvironment) -> None:
    assert [each["function"]["name"] for each in environment.tools()] == NAMES
    assert environment.tools()[0]["function"]["parameters"] == {
        "type": "object", "required": ["a"],
        "properties": {
            "a": {"type": "integer", "description": "The first."}, "b": {"type": "integer", "description": "The second."},
        },
    }  # fmt: skip


def test_results_and_wrong_arguments(environment: ToolsEnvironment, capfd: pytest.CaptureFixture[str]) -> None:
    """Arguments are converted by their types, as in "2"; what a tool prints reaches no terminal."""
    found = observe(
        environment, asked("add", a=2, b=3), asked("add", a="2"),
        f"First {asked('add', a=1)}\n{asked('search', query='ada')} then",
        asked("add", b=1), asked("add", a="two"), asked("add", a=1, c=2), asked("sub", a=1),
    )  # fmt: skip
    assert found == [
        ("5", 1, 0), ("3", 1, 0), ('2\n[{"title": "Ada"}]', 2, 0),
        ("error: add: a: Missing required argument", 1, 1),
        ("error: add: a: Input should be a valid integer, unable to parse string as an integer", 1, 1),
        ("error: add: c: Unexpected keyword argument", 1, 1),
        ("error: there is no tool 'sub'; the tools are add, search, draw, misbehave, hostile", 1, 1),
    ]  # fmt: skip
    assert "\x1b" not in "".join(capfd.readouterr())


def test_the_same_call_draws_the_same_number(environment: ToolsEnvironment) -> None:
    (first, *_), (again, *_) = observe(environment, asked("draw"), asked("draw"))
    assert first == again and 0 < float(first) < 1


def test_limits_are_observations(environment: ToolsEnvironment) -> None:
    hows = ["exit", "quit", "raise", "odd", "memory", "long", "bytes", "half", "none"]
    found = dict(zip(hows, observe(environment, *[asked("misbehave", how=how) for how in hows]), strict=True))
    assert found["exit"] == ("error: misbehave ended its process", 1, 1)
    assert found["quit"] == ("error: misbehave raised SystemExit: 1", 1, 1)
    assert found["raise"][0].startswith("error: misbehave raised ValueError: \x1b[31mno") and len(found["raise"][0]) < 400
    assert found["odd"] == ("error: misbehave raised Odd: ", 1, 1)
    assert found["memory"] == ("error: misbehave raised MemoryError: ", 1, 1)
    assert found["long"] == ("y" * 500 + "\n[cut here: 1,000,000 characters, 500 are shown]", 1, 1)
    assert found["bytes"] == ("��ok", 1, 0)
    assert found["half"] == ("? half", 1, 0)
    assert found["none"] == ("null", 1, 0)
    assert observe(environment, asked("add", a=1)) == [("2", 1, 0)]  # they go on


def test_a_call_that_hangs_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "my_tools.py"
    path.write_text(TOOLS)
    environment = ToolsEnvironment.build(ToolsEnv(functions=f"{path}:misbehave", timeout_s=0.3, workers=1), byte_tokenizer())
    try:
        state = environment.start(PROMPT)
        turn = environment.step(state, asked("misbehave", how="hang"))
    finally:
        environment.close()
    assert (turn.observation, turn.failed_calls) == ("error: misbehave did not answer within 0.3 seconds", 1)
    assert turn.seconds == 0.3


def test_a_turn_without_a_call_ends_the_episode(environment: ToolsEnvironment) -> None:
    state = environment.step(environment.start(PROMPT), asked("add", a=1)).state
    assert state == {"calls": 1}
    assert environment.step(state, "It is 2.").done and environment.step(state, "").done
    many = environment.step(state, asked("add", a=1) * 10)
    assert many.state == {"calls": 9} and (many.calls, many.failed_calls) == (10, 2)
    assert many.observation.endswith("2\nerror: 10 calls in one turn; only the first 8 were made")


MALFORMED = {
    "<tool_call>": "it is no valid JSON (Expecting value",
    '<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>': "it is no valid JSON",
    '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>': "it is no valid JSON (NaN is no JSON)",
    "<tool_call>[1]</tool_call>": "it has no name",
    '<tool_call>{"name": ["add"]}</tool_call>': "it has no name",
    '<tool_call>{"name": "add", "arguments": [1]}</tool_call>': "its arguments are no JSON object",
    '<tool_call>{"name": "add", "arguments": "[1"}</tool_call>': "its arguments are no JSON object",
    f"<tool_call>{'[' * 90_000}</tool_call>": "it is no valid JSON",
    f"<tool_call>{'1' * 90_000}</tool_call>": "it is no valid JSON",
    f"<tool_call>{' ' * 100_001}</tool_call>": "it has 100,001 characters, more than 100,000",
}


@pytest.mark.parametrize("text", list(MALFORMED), ids=range(len(MALFORMED)))
def test_a_malformed_call_is_an_observation(environment: ToolsEnvironment, text: str) -> None:
    ((observation, calls, failed),) = observe(environment, text)
    assert (calls, failed) == (1, 1)
    assert observation.startswith(f"error: the call cannot be made, {MALFORMED[text]}")
    assert observation.endswith('; write <tool_call>{"name": ..., "arguments": {...}}</tool_call>')


def test_forms_of_a_call() -> None:
    two = Call("add", '{"a": 2}')
    assert hermes_calls("no call") == [] == hermes_calls("")
    assert hermes_calls('<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n') == [two]  # the end may be missing
    assert hermes_calls('<tool_call>{"name": "add", "arguments": "{\\"a\\": 2}"}</tool_call>') == [two]
    assert hermes_calls('<tool_call>{"name": "now"}</tool_call>') == [Call("now", "{}")]
    assert [type(each) for each in hermes_calls(f"<tool_call>x</tool_call> {asked('add', a=2)}")] == [Malformed, Call]


def test_the_templates_own_parser_is_used(environment: ToolsEnvironment) -> None:
    """A form of its own, XML around each argument; the schema says that a is a number. What it cannot read is malformed."""
    tokenizer = byte_tokenizer()
    tokenizer.response_template = {
        "defaults": {"role": "assistant"}, "start_anchor": "<|assistant|>",
        "fields": {
            "tool_calls": {
                "open_pattern": r"<call=(?P<name>\w+)>", "close": "</call>", "repeats": True, "content": "xml-inline",
                "content_args": {"tag_pattern": r"<arg=(?P<key>\w+)>(?P<value>.*?)</arg>"},
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"content": "text"},
        },
    }  # fmt: skip
    parse = build_parser(tokenizer, environment.tools())
    assert parse("I add. <call=add><arg=a>2</arg></call>") == [Call("add", '{"a": 2}')]
    assert parse("It is 2.") == [] == parse("") and parse(asked("add", a=2)) == []
    json_inside = {"tool_calls": {"open": "<call>", "close": "</call>", "content": "json"}, "content": {"content": "text"}}
    tokenizer.response_template = {"start_anchor": "<|assistant|>", "fields": json_inside}
    assert [type(each) for each in build_parser(tokenizer, [])("<call>{oops</call>")] == [Malformed]
    tokenizer.response_template = {"fields": json_inside}
    with pytest.raises(ModelError, match=r"the response_template of the tokenizer cannot be used \(.*start_anchor.*\); corr"):
        build_parser(tokenizer, [])


def test_a_thousand_hostile_results(environment: ToolsEnvironment) -> None:
    """None reaches a terminal as it is, none ends the episode or the run."""
    found = observe(environment, *[asked("hostile", number=number) for number in range(1000)])
    cut = 0
    for text, calls, failed in found:
        assert calls == 1 and len(text) < 600 and visible(text).replace("\n", "").replace("\t", "").isprintable()
        cut += failed
    assert cut == 4  # those of a megabyte


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ("my_tools.py", "write .*with a colon before the names"),
        ("{file}:[add, add]", "names 'add' twice"),
        ("{file}:[add, sub]", "env.functions names 'sub', but .* does not have it; it has .*add"),
        ("{file}:[bare]", "env.functions names 'bare', which cannot be shown to the model: .*docstring.*; give it a type"),
        ("{file}:untyped", "env.functions names 'untyped', which cannot be shown to the model: .*type hint.*; give it a type"),
        ("nowhere.py:[add]", "the file .* does not exist"),
    ],
)
def test_functions_that_do_not_fit_are_refused(tmp_path: Path, functions: str, message: str) -> None:
    path = tmp_path / "my_tools.py"
    path.write_text(f'{TOOLS}\ndef bare(a: int): ...\ndef untyped(a):\n    """Do.\n\n    Args:\n        a: It.\n    """\n')
    with pytest.raises(ConfigError, match=message):
        ToolsEnvironment.build(ToolsEnv(functions=functions.format(file=path)), byte_tokenizer())


# ---------------------------------------------------------------- with the chat template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_no_hostile_result_becomes_a_special_token(environment: ToolsEnvironment) -> None:
    """As many added tokens as around a plain observation, whatever names of tokens the result has."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<tool_call>", "</tool_response>"])
    tokenizer.chat_template = CHATML
    added = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    between = Between(tokenizer, "tool", True, (tokenizer.convert_tokens_to_ids("<|im_end|>"),), {})
    plain = [token for token in between.encode("plain", ended=False) if token in added]
    assert len(plain) == 4  # the end of the turn, two around the observation, the next turn
    for text, *_ in observe(environment, *[asked("hostile", number=number) for number in range(1000)]):
        assert [token for token in between.encode(text, ended=False) if token in added] == plain


def test_a_template_without_tools_tells_of_them_in_the_system_turn(environment: ToolsEnvironment) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tools = environment.tools()[:1]
    text = build_renderer(TemplateConfig(system="Be brief."), tokenizer, tools=tools).text("1 + 2?")
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call these tools:\n<tools>\n{") and '"name": "add"' in text
    assert "write <tool_call>" in text and text.endswith("<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n")
    kept = build_renderer(TemplateConfig(), tokenizer, tools=tools)
    turns = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "1 + 2?"}]
    assert kept.text("1 + 2?", messages=turns).startswith("<|im_start|>system\nMine.\n\nYou can call")
    assert "tools" not in build_renderer(TemplateConfig(), tokenizer).text("1 + 2?")
    tokenizer.chat_template = "{% if tools %}{{ tools | length }} tools {% endif %}" + CHATML
    assert kept.text("1 + 2?").startswith("1 tools <|im_start|>user")
