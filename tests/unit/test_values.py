"""Values of the command line and of files: strings for string keys, `none`, `~`, and files as editors save them."""

from __future__ import annotations

import ast
import codecs
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from surroundings import ROOT

from deepgrpo.arguments import expand_homes
from deepgrpo.config import Config, load_recipe, parse_config
from deepgrpo.config.problems import _field, tables_of
from deepgrpo.config.values import key_kinds, read_value
from deepgrpo.errors import ConfigError
from deepgrpo.eval.options import EvalOptions
from deepgrpo.lab.compare.experiment import load_experiment
from deepgrpo.report.options import ReportOptions

RECIPE = """
[model]
type = "scratch"
[data]
type = "synthetic"
[reward]
type = "task"
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["2024", "true", "1e3", "1.5", "2024-01-01", "[1]", "none", "null", "0x10", "inf"])
def test_a_string_key_takes_any_word_as_a_string(minimal: Path, name: str) -> None:
    assert load_recipe(minimal, [("run.name", name)]).run.name == name


def test_other_keys_keep_their_types(minimal: Path) -> None:
    overrides = [
        ("run.seed", "7"), ("optim.lr", "1e-5"), ("log.wandb", "true"), ("run.name", '"quoted"'), ("eval.every", "none"),
        ("loss.dual_clip", "None"), ("sampling.stop", '["7"]'), ("credit.scale", "none"), ("cluster", "none"),
        ("data.columns.question", "2"),
    ]  # fmt: skip
    base = [
        ("data", '{type = "jsonl", path = "x.jsonl"}'), ("reward", '{type = "exact"}'),
        ("model", '{type = "pretrained", path = "7"}'),
    ]  # fmt: skip
    config: Any = load_recipe(minimal, base + overrides)
    found = (config.run.seed, config.optim.lr, config.log.wandb, config.run.name, config.eval.every, config.loss.dual_clip)
    assert found == (7, 1e-5, True, "quoted", None, None)
    assert (config.sampling.stop, config.credit.scale, config.data.columns.question) == (("7",), "none", "2")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"run": {"name": 2024}}, 'run.name is 2024; it should be a string: write "2024"'),
        ({"run": {"name": True}}, 'run.name is True; it should be a string: write "true"'),
        ({"run": {"name": ""}}, "it cannot be empty"),
        ({"run": {"name": "~/x"}}, "choose a plain name, and the place with run.dir"),
        ({"sampling": {"stop": "x"}}, 'sampling.stop is \'x\'; it should be a list: write ["x"]'),
        ({"eval": {"k": 4}}, "eval.k is 4; it should be a list: write [4]"),
    ],
)
def test_a_value_of_another_type_is_answered_with_what_to_write(changes: dict[str, Any], says: str) -> None:
    raw = {"model": {"type": "scratch"}, "data": {"type": "synthetic"}, "reward": {"type": "task"}}
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse_config(raw | changes)


# ---------------------------------------------------------------- values that messages recommend


def _recommended() -> list[tuple[str, str, str]]:
    """(file, key, value) of every `section.key = value` in a string of the source."""
    found = []
    for path in sorted((ROOT / "src" / "deepgrpo").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for key, value in re.findall(r"\b([a-z_]+(?:\.[a-z_]+)+) = (\"[^\"{}]+\"|[\w.+-]*\w)", node.value):
                    found.append((path.name, key, value))
    return found


def _annotations(key: str) -> list[Any]:
    sections, annotations = [Config], []
    for part in key.split("."):
        annotations = [a for s in sections if (a := _field(s, part)) is not None]  # type: ignore[type-var]
        sections = [s for a in annotations for s in tables_of(a)]  # type: ignore[misc]
    return annotations


def test_every_value_that_a_message_recommends_is_taken_on_the_command_line() -> None:
    """As a shell passes it: without the quotes of the message."""
    tried = 0
    for file, key, value in _recommended():
        word = value.strip('"')
        kinds = key_kinds(key.split("."), {}, Config)
        if not kinds:
            continue  # no key of a recipe: a key of transformers or vLLM
        read = read_value(word, kinds)
        for annotation in _annotations(key):
            try:
                TypeAdapter(annotation).validate_python(read)
                tried += 1
                break
            except ValidationError:
                continue
        else:
            raise AssertionError(f"{file}: --{key} {word} is refused")
    assert tried > 20


# ---------------------------------------------------------------- ~


PATHS: list[tuple[str, dict[str, Any]]] = [
    ("run.dir", {"run": {"dir": "~/x"}}),
    ("model.path", {"model": {"type": "pretrained", "path": "~/x"}}),
    ("model.tokenizer", {"model": {"type": "pretrained", "path": "m", "tokenizer": "~/x"}}),
    ("warmstart.from_", {"warmstart": {"from": "~/x"}}),
    ("data.path", {"data": {"type": "jsonl", "path": "~/x"}}),
    ("data.path", {"data": {"type": "parquet", "path": "~/x"}}),
    ("data.path", {"data": {"type": "hf", "path": "~/x"}}),
    ("eval.data.path", {"eval": {"data": {"type": "jsonl", "path": "~/x"}}}),
    ("reward.function", {"reward": {"type": "user", "function": "~/x"}}),
    ("explore.strategy", {"explore": {"type": "user", "strategy": "~/x", "num_rollouts": 2, "most_branches": 0}}),
    ("explore.segments.function", {"explore": {"type": "deep", "segments": {"type": "user", "function": "~/x"}}}),
    ("loss.policy", {"loss": {"policy": "~/x:f"}}),
    ("engine.python", {"engine": {"type": "vllm", "python": "~/x"}}),
]


@pytest.mark.parametrize(("key", "changes"), PATHS)
def test_every_path_of_a_recipe_may_begin_at_home(key: str, changes: dict[str, Any], tmp_path: Path) -> None:
    raw = {
        "model": {"type": "pretrained", "path": "m"}, "data": {"type": "jsonl", "path": "d"}, "reward": {"type": "exact"},
    }  # fmt: skip
    found: Any = parse_config(raw | changes)
    for part in key.split("."):
        found = getattr(found, part)
    assert found.removesuffix(":f") == str(tmp_path / "home" / "x")  # HOME in tests


def test_every_option_of_the_command_line_may_begin_at_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    options = expand_homes(EvalOptions(model="~/m", data=("~/d.jsonl", "gsm8k"), data_dir="~/s", json="~/j"))
    assert (options.model, options.data, options.data_dir, options.json) == (
        f"{home}/m", (f"{home}/d.jsonl", "gsm8k"), f"{home}/s", f"{home}/j",
    )  # fmt: skip
    report = expand_homes(ReportOptions(runs=(Path("~/a"), Path("b")), title="~ 3 runs"))
    assert (report.runs, report.title) == ((home / "a", Path("b")), "~ 3 runs")


def test_a_base_may_begin_at_home(tmp_path: Path, minimal: Path) -> None:
    (tmp_path / "home").mkdir()
    minimal.rename(tmp_path / "home" / "base.toml")
    (tmp_path / "child.toml").write_text('base = "~/base.toml"\n', encoding="utf-8")
    assert load_recipe(tmp_path / "child.toml").model.type == "scratch"


# ---------------------------------------------------------------- files as editors save them


@pytest.mark.parametrize("content", [codecs.BOM_UTF8 + RECIPE.encode(), RECIPE.replace("\n", "\r\n").encode()])
def test_a_byte_order_mark_and_other_line_ends_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.toml").write_bytes(content)
    assert load_recipe(tmp_path / "a.toml").data.type == "synthetic"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (RECIPE.encode("utf-16"), "looks like UTF-16 or a binary file; save it as UTF-8"),
        (RECIPE.encode("utf-16-le"), "looks like UTF-16 or a binary file; save it as UTF-8"),
        (RECIPE.encode() + b"# caf\xe9\n", "line 8 has the byte 0xe9, which is not UTF-8; save it as UTF-8"),
        (b"a = " + b"[" * 5000, "nested too deeply"),
    ],
)
def test_another_encoding_is_answered_with_a_sentence(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.toml").write_bytes(content)
    for load in (load_recipe, load_experiment):
        with pytest.raises(ConfigError, match=re.escape(says)):
            load(tmp_path / "a.toml")
