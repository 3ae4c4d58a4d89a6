"""Recipes: what is refused and how it is said, what an override may write, and the way to TOML and back."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from deepgrpo.config import Config, DeepExplore, RootExplore, load_recipe, parse_config, to_toml
from deepgrpo.config.explain import describe_keys, section_names
from deepgrpo.config.shipped import find_recipe, list_recipes, recipe_dir
from deepgrpo.errors import ConfigError

RECIPES = [name for name, _ in list_recipes()]

MINIMAL = """
[model]
type = "scratch"
[data]
type = "synthetic"
[reward]
type = "task"
[explore]
type = "deep"
"""

PRETRAINED: dict[str, Any] = {
    "model": {"type": "pretrained", "path": "some/model"},
    "data": {"type": "jsonl", "path": "train.jsonl"},
    "reward": {"type": "math"},
}


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.toml"
    path.write_text(MINIMAL)
    return path


def refuse(raw: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return str(caught.value)


def with_(**sections: Any) -> dict[str, Any]:
    return {**tomllib.loads(MINIMAL), **sections}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (with_(explore={"type": "deep", "gama": 2}), "key 'explore.gama' (value 2); did you mean 'explore.gamma'?"),
        (with_(optm={"lr": 1}), "unknown key 'optm' (value {'lr': 1}); did you mean 'optim'?"),
        (
            with_(explore={"type": "deep", "segments": {"siez": 8}}),
            "unknown key 'explore.segments.siez' (value 8); did you mean 'explore.segments.size'?",
        ),
        (with_(loss={"lamda": 2.0}), "did you mean 'loss.lambda'?"),
        (with_(loss={"qqqq": 2.0}), "known keys: lambda, beta,"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_match(raw: dict[str, Any], says: str) -> None:
    assert says in refuse(raw)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (with_(optim={"lr": "fast"}), "optim.lr is 'fast'"),
        (with_(optim={"lr": -1.0}), "optim.lr is -1.0; it should be greater than 0"),
        (with_(optim={"lr": float("nan")}), "optim.lr is nan; it should be a finite number"),
        (with_(run={"steps": -1}), "run.steps is -1; it should be greater than or equal to 0"),
        (with_(run={"steps": 2.5}), "run.steps is 2.5"),
        (with_(loss={"reduction": "tok"}), "loss.reduction is 'tok'; it should be 'token', 'sequence' or 'constant'"),
        (with_(sampling={"top_p": 1.5}), "sampling.top_p is 1.5"),
        (with_(optim={"betas": [0.9]}), "optim.betas"),
        (with_(optim={"betas": [0.9, 1.0]}), "optim.betas.1 is 1.0; it should be less than 1"),
        (with_(data={"type": "synthetic", "modulus": 11}), "data.modulus is 11"),
        (with_(explore={"type": "depe"}), "(did you mean 'deep'?)"),
        (with_(explore={"gamma": 1}), "explore.type is missing"),
        ({"data": {"type": "synthetic"}, "reward": {"type": "task"}}, "key 'model' is missing; add it"),
        (with_(run=3), "run is 3; it should be a table"),
        (with_(eval=None), "eval is none; it should be a table"),
        (with_(explore=None), "explore is none; it should be a table"),
        (with_(sampling={"stop": "#"}), "sampling.stop is '#'; it should be a list"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_key(raw: dict[str, Any], says: str) -> None:
    assert says in refuse(raw)


def test_all_problems_are_told_at_once() -> None:
    said = refuse(with_(optim={"lr": -1.0}, run={"stepz": 3}))
    assert "optim.lr" in said
    assert "run.steps" in said
    assert len(said.splitlines()) == 2


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (PRETRAINED | {"model": {"type": "scratch"}}, 'set data.type = "synthetic" or model.type = "pretrained"'),
        (PRETRAINED | {"warmstart": {}}, "remove [warmstart]"),
        (PRETRAINED | {"reward": {"type": "task"}}, 'choose reward.type = "math", "exact" or "user"'),
        (with_(optim={"minibatches": 9}, run={"prompts_per_step": 8}), "run.prompts_per_step = 8"),
        (with_(explore={"type": "deep", "branches_per_pivot": 1}), "a local baseline needs at least 2"),
        (with_(eval={"samples": 4, "k": [1, 8], "data": {"type": "synthetic"}}), "eval.k has 8, but eval.samples is 4"),
        (with_(eval={"every": 5}), "eval.every is 5, but eval.data is missing; add a table [eval.data]"),
        (with_(eval={"every_tokens": 500}), "eval.every_tokens is 500, but eval.data is missing"),
        (with_(eval={"every": 5, "every_tokens": 500}), 'they are two ways to say when to evaluate: set one of them to "none"'),
        (
            with_(warmstart={"target_accuracy": 0.4}),
            "warmstart.target_accuracy is 0.4, but eval.every is missing, so there are no questions to measure it on; "
            "set eval.every and add a table [eval.data], or remove warmstart.target_accuracy",
        ),
        (with_(warmstart={"target_accuracy": 0.4}, eval={"data": {"type": "synthetic"}}), "set eval.every"),
    ],
)
def test_an_impossible_combination_names_the_remedy(raw: dict[str, Any], says: str) -> None:
    assert says in refuse(raw)


@pytest.mark.parametrize("name", ["", "..", "../other", "a/../../b", "/tmp/run", ".", "./", "a\0b"])
def test_a_run_stays_inside_its_directory(name: str) -> None:
    assert f"run.name is {name!r}; it names a directory inside run.dir" in refuse(with_(run={"name": name}))


@pytest.mark.parametrize("name", ["run", "sweep/lr-1", "a..b", ".hidden", "Größe 1"])
def test_a_name_of_a_run(name: str) -> None:
    assert parse_config(with_(run={"name": name})).run.name == name


@pytest.mark.parametrize("explore", [{"type": "root"}, {"type": "deep", "success_threshold": 0.5}])
def test_every_strategy_says_what_a_success_is(explore: dict[str, Any]) -> None:
    assert parse_config(with_(explore=explore)).explore.success_threshold == explore.get("success_threshold", 0.0)


def test_one_branch_is_fine_where_there_are_no_pivots() -> None:
    config = parse_config(with_(explore={"type": "deep", "num_pivots": 0, "branches_per_pivot": 1}))
    assert isinstance(config.explore, DeepExplore)


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "does not exist"), ("[run\n", "is not valid TOML"), ("\udcff", "is not valid TOML")],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=says):
        load_recipe(path)


def test_a_directory_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory"):
        load_recipe(tmp_path)


def test_a_config_cannot_be_changed() -> None:
    config = parse_config(tomllib.loads(MINIMAL))
    with pytest.raises(ValidationError):
        config.run.steps = 3  # type: ignore[misc]


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("run.steps", "7", 7),
        ("optim.lr", "3e-5", 3e-5),
        ("explore.gamma", "-20", -20.0),
        ("checkpoint.keep_best", "false", False),
        ("run.name", '"quoted name"', "quoted name"),
        ("run.name", "bare-word", "bare-word"),
        ("run.dir", "some/path", "some/path"),
        ("eval.data.type", "synthetic", "synthetic"),
        ("sampling.stop", '["\\n\\n", "#"]', ("\n\n", "#")),
        ("optim.betas", "[0.8, 0.99]", (0.8, 0.99)),
        ("explore.segments", '{type = "tokens", size = 8}', {"type": "tokens", "size": 8, "extra_ends": (), "function": None}),
        ("loss.dual_clip", "none", None),
        ("loss.dual_clip", "None", None),
        ("warmstart", "none", None),
        ("loss.lambda", "0.5", 0.5),
    ],
)
def test_an_override_is_read_as_toml(minimal: Path, key: str, value: str, expected: Any) -> None:
    dumped: Any = load_recipe(minimal, [(key, value)]).model_dump()
    for part in key.split("."):
        dumped = dumped[part]
    assert dumped == expected


def test_a_later_override_wins(minimal: Path) -> None:
    assert load_recipe(minimal, [("run.steps", "7"), ("run.steps", "8")]).run.steps == 8


def test_an_override_can_put_a_table_in_place_of_another(minimal: Path) -> None:
    overrides = [("explore.gamma", "1.0"), ("explore", '{type = "root", num_rollouts = 4}')]
    assert load_recipe(minimal, overrides).explore == RootExplore(num_rollouts=4)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("optim.lrr", "1", "did you mean 'optim.lr'?"),
        ("run.steps", "none", "run.steps"),
        ("data.type.x", "1", "is a value"),
    ],
)
def test_a_wrong_override_is_refused(minimal: Path, key: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(minimal, [(key, value)])
    assert says in str(caught.value)


# ---------------------------------------------------------------- TOML and back


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_survives_the_way_to_toml_and_back(name: str, tmp_path: Path) -> None:
    config = load_recipe(find_recipe(name))
    again = tmp_path / "config.toml"
    again.write_text(to_toml(config), encoding="utf-8")
    assert load_recipe(again) == config


def test_an_absent_value_survives_where_absent_is_not_the_default(minimal: Path, tmp_path: Path) -> None:
    # dual_clip defaults to 3.0, so leaving None out of the file would bring the 3.0 back
    config = load_recipe(minimal, [("loss.dual_clip", "none"), ("checkpoint.every", "none")])
    again = tmp_path / "config.toml"
    again.write_text(to_toml(config))
    assert load_recipe(again) == config


@given(
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/."), min_size=1),
    lr=st.floats(min_value=1e-12, max_value=1e3),
    gamma=st.floats(min_value=-1e6, max_value=1e6),
    stop=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f")), max_size=3),
)
def test_any_value_survives_the_way_to_toml_and_back(name: str, lr: float, gamma: float, stop: list[str]) -> None:
    raw = with_(run={"name": name}, optim={"lr": lr}, explore={"type": "deep", "gamma": gamma}, sampling={"stop": stop})
    config = parse_config(raw)
    assert parse_config(tomllib.loads(to_toml(config))) == config


# ---------------------------------------------------------------- what a reader finds


def models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation, *(m for f in annotation.model_fields.values() for m in models(f.annotation))]
    return [m for part in get_args(annotation) for m in models(part)]


@pytest.mark.parametrize("model", list(dict.fromkeys(models(Config))), ids=lambda model: model.__name__)
def test_every_field_has_a_docstring(model: type[BaseModel]) -> None:
    assert model.__doc__
    # a table is described by its own class, a kind by the class it chooses
    silent = [
        name
        for name, info in model.model_fields.items()
        if not (info.description or models(info.annotation) or name == "type")
    ]
    assert silent == []


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_begins_with_a_sentence_and_runs_under_its_own_name(name: str) -> None:
    lines = find_recipe(name).read_text().splitlines()
    assert lines[0].startswith("# ")
    assert lines[0].endswith(".")
    assert name.startswith(load_recipe(find_recipe(name)).run.name)


def test_the_arms_of_a_table_differ_only_where_they_should() -> None:
    for pair in ("gsm8k-qwen2.5-0.5b", "math-qwen2.5-1.5b", "math-qwen2.5-7b"):
        deep, grpo = (load_recipe(find_recipe(f"{pair}-{arm}")) for arm in ("deep", "grpo"))
        differing = {name for name in section_names() if getattr(deep, name) != getattr(grpo, name)}
        assert differing == {"run", "explore", "loss"}
        # the branch stream's own switch is all that differs in the loss
        assert deep.loss.model_copy(update={"min_branch_sequences": 0}) == grpo.loss


def test_the_keys_of_a_section() -> None:
    text = describe_keys("explore.recoverability")
    assert "explore.recoverability.window = 10000  (integer > 0)" in text
    assert "Latest pivots kept for the fit (first in, first out)." in text
    assert "loss" not in text


def test_the_keys_of_all_sections() -> None:
    text = describe_keys()
    for line in (
        '[explore] with type = "deep"',
        "[warmstart]  (optional table)",
        "  loss.lambda = 1.0  (number ≥ 0)",
        "  loss.dual_clip = 3.0  (number > 1 or none)",
        "  model.path = …  (string)",
        '  credit.scale = "none"  ("none" | "std" | "mean" | "part_std")',
        "  optim.betas = [0.9, 0.999]  ([number ≥ 0 < 1, number ≥ 0 < 1])",
        "  sampling.stop = []  (list of string)",
        "  data.params = {}  (a table)",
        "  eval.data = none  (a table, or none)",
    ):
        assert line in text.splitlines()
    assert text.count("[data.template]") == 1


def test_the_keys_of_an_unknown_section() -> None:
    with pytest.raises(ConfigError, match="did you mean 'explore'"):
        describe_keys("explor")
    with pytest.raises(ConfigError, match="sections: run, model"):
        describe_keys("zzz")


# ---------------------------------------------------------------- finding a recipe


def test_a_recipe_is_found_by_name_or_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo") == recipe_dir() / "demo.toml"
    assert find_recipe("mine.toml") == Path("mine.toml")
    assert find_recipe("sub/mine") == Path("sub/mine")
    Path("demo").write_text(MINIMAL)
    assert find_recipe("demo") == Path("demo")


def test_an_unknown_recipe_is_answered_with_the_nearest_match() -> None:
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        find_recipe("dmo")
    with pytest.raises(ConfigError, match="shipped recipes: demo, "):
        find_recipe("zzzzzz")


def test_adapters_with_a_warm_start_have_no_reference() -> None:
    raw = {
        "model": {"type": "pretrained", "path": "x", "lora": {}}, "warmstart": {}, "data": {"type": "synthetic"},
        "reward": {"type": "task"}, "loss": {"beta": 0.1},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"loss\.beta is 0\.1 with model\.lora and a warm start"):
        parse_config(raw)
    assert parse_config({**raw, "loss": {"beta": 0.0}}).warmstart is not None


# ---------------------------------------------------------------- recipes with a base


BASE = """
[run]
name = "base"
steps = 7

[model]
type = "scratch"

[data]
type = "synthetic"

[reward]
type = "task"

[engine]
max_rows = 9

[explore]
type = "deep"
gamma = 3.0
"""


def test_a_recipe_is_its_base_with_changes(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "mine.toml").write_text('base = "base.toml"\n[run]\nname = "mine"\n[explore]\ngamma = 1.0\n')
    (tmp_path / "last.toml").write_text('base = "mine.toml"\n[explore]\ntype = "root"\n[engine]\ntype = "vllm"\n')
    mine = load_recipe(tmp_path / "mine.toml", [("run.steps", "8")])
    assert (mine.run.name, mine.run.steps, mine.engine.max_rows) == ("mine", 8, 9)
    assert isinstance(mine.explore, DeepExplore) and mine.explore.gamma == 1.0
    # another type begins empty
    last = load_recipe(tmp_path / "last.toml")
    assert (last.run.name, last.run.steps, last.explore, last.engine.max_rows) == ("mine", 7, RootExplore(), 256)
    # one that comes along, by its name; the resolved recipe has no base
    (tmp_path / "demo2.toml").write_text('base = "demo"\n[run]\nname = "demo2"\n')
    demo = load_recipe(tmp_path / "demo2.toml")
    assert demo.run.name == "demo2" and "base" not in to_toml(demo)


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ('"mine.toml"', "is its own base"), ("3", "base is 3; it should be the name or the path"),
        ('"nowhere.toml"', "nowhere.toml' does not exist"), ('"dem"', "did you mean 'demo'"),
    ],
)  # fmt: skip
def test_a_base_that_is_none(tmp_path: Path, base: str, says: str) -> None:
    (tmp_path / "mine.toml").write_text(f"base = {base}\n")
    with pytest.raises(ConfigError, match=says):
        load_recipe(tmp_path / "mine.toml")
