"""Several sources mixed by weight: shares, places, names, figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trees import make_tree

from deepgrpo.config import Config, MixData, parse_config, to_toml
from deepgrpo.config.files import load_recipe
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.errors import ConfigError, DataError
from deepgrpo.prompts.mixed import turns_of
from deepgrpo.prompts.source import Cursor, PromptSource, build_source
from deepgrpo.prompts.tasks import build_task
from deepgrpo.records import Prompt
from deepgrpo.train.metrics import source_metrics
from tiny import byte_tokenizer, write_jsonl

TOKENIZER = byte_tokenizer()


def mix(place: Path, *sources: dict[str, Any], **fields: Any) -> MixData:
    """A mix of files with 6, 9, ... rows; the keys of a source are merged in."""
    tables = []
    for number, keys in enumerate(sources):
        name = "abc"[number]
        rows = [{"question": f"{name}{i}", "answer": "1", "note": name} for i in range(6 + 3 * number)]
        data = {"type": "jsonl", "path": write_jsonl(place / f"{name}.jsonl", rows), "template": {"chat": False}}
        tables.append({**keys, "data": {**data, **keys.get("data", {})}})
    return MixData.model_validate({"sources": tables, **fields})


def source_of(data: MixData, shuffle: bool = True) -> PromptSource:
    return build_source(data, TOKENIZER, seed=0, context=512, shuffle=shuffle)


def names(prompts: tuple[Prompt, ...]) -> str:
    return "".join(prompt.source for prompt in prompts)


# ---------------------------------------------------------------- shares


def test_turns_by_hand() -> None:
    """Weights 3 and 1: turns of the first at 1/6, 3/6, 5/6, ..., of the second at 1/2, 3/2, ...; the first wins a tie."""
    assert turns_of([3, 1], [0, 0], 8) == [0, 0, 1, 0, 0, 0, 1, 0]
    assert turns_of([3, 1], [3, 1], 4) == [0, 0, 1, 0]  # where the four above left it
    assert turns_of([1, 1], [0, 0], 5, [1, 3]) == [0, 1, 1, 1]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=4), st.integers(1, 60))
@example([1.0, 1.0, 1.0], 7)
@example([10.0, 0.1, 0.1, 0.1], 60)
@settings(deadline=None, max_examples=60)
def test_every_source_has_its_share(weights: list[float], count: int) -> None:
    turns = turns_of(weights, [0] * len(weights), count)
    for index, weight in enumerate(weights):
        assert abs(turns.count(index) - count * weight / sum(weights)) <= (1 + len(weights)) / 2


def test_a_mix_takes_by_weight_and_counts_the_epochs_of_each(tmp_path: Path) -> None:
    source = source_of(mix(tmp_path, {"weight": 2.0}, {}))
    assert (source.size, source.described) == (15, "2 sources: a 67% (6 prompts), b 33% (9 prompts)")
    prompts, cursor = source.take(Cursor(), 12)
    assert names(prompts) == "abaabaabaaba"[:12]
    assert cursor == Cursor(0, 12, sources=(Cursor(1, 2, taken=8), Cursor(0, 4, taken=4)))
    assert source.metrics(cursor) == {"source/a/epochs": 1 + 2 / 6, "source/b/epochs": 4 / 9}
    of_a = [prompt.id for prompt in prompts if prompt.source == "a"]
    assert sorted(of_a[:6]) == [f"a/{i}" for i in range(1, 7)]
    assert prompts[0].columns["data_source"] == "a"


@given(st.integers(1, 30), st.integers(0, 20))
@example(1, 1)
@settings(deadline=None, max_examples=15)
def test_a_cursor_of_a_mix_is_a_place(shared: PromptSource, first: int, second: int) -> None:
    together, end = shared.take(Cursor(), first + second)
    a, middle = shared.take(Cursor(), first)
    b, after = shared.take(Cursor.from_dict(json.loads(json.dumps(middle.to_dict()))), second)
    assert a + b == together and (after == end or not second)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> PromptSource:
    """Loaded, streamed and generated sources in one mix."""
    place = tmp_path_factory.mktemp("mix")
    files = mix(place, {"weight": 2.0}, {"data": {"streaming": True}}).model_dump()["sources"]
    gym = {"type": "reasoning_gym", "task": "chain_sum", "size": 5, "template": {"chat": False}}
    return source_of(MixData.model_validate({"sources": [*files, {"weight": 0.5, "data": gym}]}))


def test_the_head_of_a_mix_is_for_evaluation(tmp_path: Path) -> None:
    source = source_of(mix(tmp_path, {"weight": 2.0}, {}), shuffle=False)
    assert [prompt.id for prompt in source.head(4)] == ["a/1", "b/1", "a/2", "a/3"]
    assert len(source.head(100)) == 15 == len({prompt.id for prompt in source.head(100)})
    assert [len(source_of(mix(tmp_path, {}, {"data": {"limit": 2}}, limit=4)).head(99))] == [6]


def test_a_rows_own_data_source_stays(tmp_path: Path) -> None:
    data = mix(tmp_path, {})
    write_jsonl(tmp_path / "a.jsonl", [{"question": "1", "answer": "1", "data_source": "own"}])
    assert source_of(data).head(1)[0].columns["data_source"] == "own"


def test_rows_left_out_and_errors_name_the_source(tmp_path: Path) -> None:
    data = mix(tmp_path, {}, {})
    write_jsonl(tmp_path / "b.jsonl", [{"question": "1", "answer": ""}, {"question": "1", "answer": "1"}])
    assert source_of(data).skipped == {"no answer of b": 1}
    write_jsonl(tmp_path / "b.jsonl", [{"question": "1", "answer": ""}])
    with pytest.raises(DataError, match=r"^source 'b': no usable row is left"):
        source_of(data)


def test_the_fingerprint_covers_sources_and_weights(tmp_path: Path) -> None:
    digests = {source_of(mix(tmp_path, {}, {})).digest, source_of(mix(tmp_path, {"weight": 2.0}, {})).digest}
    data = mix(tmp_path, {}, {})
    write_jsonl(tmp_path / "b.jsonl", [{"question": "1", "answer": "1"}])
    assert len(digests | {source_of(data).digest}) == 3


# ---------------------------------------------------------------- figures


def test_metrics_of_each_source() -> None:
    trees = [make_tree([(2, 0.0), (2, 1.0)]), make_tree([(2, 1.0), (2, 1.0)]), make_tree([(2, 0.0), (2, 0.0)])]
    named = [replace(t, prompt=replace(t.prompt, source=s)) for t, s in zip(trees, ("a", "b", "a"), strict=True)]
    assert source_metrics(named, [sibling_credit(tree) for tree in named]) == {
        "source/a/prompts": 2.0, "source/a/reward": 0.25, "source/a/mixed": 0.5,
        "source/b/prompts": 1.0, "source/b/reward": 1.0, "source/b/mixed": 0.0,
    }  # fmt: skip
    assert source_metrics(trees, [sibling_credit(tree) for tree in trees]) == {}


def test_a_mix_of_tasks_has_their_verifiers(tmp_path: Path) -> None:
    def section(**task: Any) -> dict[str, Any]:
        return {"data": {"type": "reasoning_gym", "size": 3, "template": {"chat": False}, **task}}

    data = MixData.model_validate({"sources": [section(task="chain_sum"), section(task="basic_arithmetic")]})
    task: Any = build_task(data)
    for prompt in source_of(data).head(6):
        assert prompt.answer is not None and task.verify(prompt, prompt.answer).value == 1.0
        check = task.check(prompt, prompt.answer)
        assert check is not None and check() == (1.0, True) and task.vote(prompt, prompt.answer) == prompt.answer
        for ask in (task.verify, task.check, task.vote):  # each asks the task of the prompt's own source
            with pytest.raises(KeyError):
                ask(replace(prompt, source="another"), prompt.answer)
    assert build_task(mix(tmp_path, {})) is None


# ---------------------------------------------------------------- recipes


def recipe(place: Path, reward: str = "math", **data: Any) -> Config:
    raw = {"model": {"type": "pretrained", "path": "m"}, "reward": {"type": reward}}
    return parse_config({**raw, "data": {**mix(place, {}, {"name": "other", "weight": 3.0}).model_dump(), **data}})


def test_a_recipe_with_sources_is_written_read_and_overridden(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    path = tmp_path / "r.toml"
    path.write_text(to_toml(config))
    assert load_recipe(path) == config
    changed = load_recipe(path, [("data.sources.0.weight", "2"), ("data.sources.1.data.path", "2024")])
    assert isinstance(changed.data, MixData)
    assert [(each.label, each.weight, each.data.path) for each in changed.data.sources] == [  # type: ignore[union-attr]
        ("a", 2.0, str(tmp_path / "a.jsonl")), ("other", 3.0, "2024"),
    ]  # fmt: skip
    for key, value, says in (
        ("data.sources.0.data.pth", "x", "unknown key 'data.sources.0.data.pth'.*; did you mean 'data.sources.0.data.path'"),
        ("data.sources.0.weight", "0", "data.sources.0.weight is 0; it should be greater than 0"),
        ("data.sources.weight", "1", "'sources' is a list of tables; write --data.sources.0.KEY VALUE for the first"),
        ("data.sources.0.data.type", "csv", "data.sources.0.data.type is 'csv'; choose one of"),
        ("data.sources.1.name", "a", "data.sources has 'a' twice; give each source a name of its own"),
        ("data.sources.1.name", "a/b", "data.sources has the name 'a/b'; it names metrics"),
        ("data.sources", "[]", "data.sources is empty; add a table"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_recipe(path, [(key, value)])
    with pytest.raises(ConfigError, match=r'reward.type is "task", but data.type is "mix"'):
        recipe(tmp_path, reward="task")
