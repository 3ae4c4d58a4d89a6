"""Data as they are published, each trained for three steps with `deep`, and resumed bit by bit from the second."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepgrpo import cli
from deepgrpo.runs.trees import load_trees
from tiny import save_model, write_jsonl

RECIPE = """
[run]
name = "run"
steps = 3
prompts_per_step = 3
device = "cpu"
[model]
type = "pretrained"
path = "model"
[reward]
type = "user"
function = "mine.py:vowels"
truncated_value = "none"
[sampling]
max_new_tokens = 10
[explore]
type = "deep"
num_rollouts = 3
branches_per_pivot = 2
[explore.segments]
type = "tokens"
size = 3
[optim]
lr = 1e-2
[loss]
beta = 0.0
[checkpoint]
every = 1
keep_last = 3
[log]
trees_every = 1
"""
REWARD = '''
def vowels(prompts, completions, answer, **columns):
    """TRL's form for conversational data. Odd numbers of bytes above 127 are right: a random model fails at times."""
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    texts = [completion[0]["content"] for completion in completions]
    return [float(sum(not c.isascii() for c in text) % 2) + 0.0 * len(reference) for text, reference in zip(texts, answer)]
'''
TURNS = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]
TIMED = ("time/", "ledger/seconds_", "tokens_per_s")


def talk(i: int) -> list[dict[str, str]]:
    turns = [*TURNS[: 3 * (i % 2)], ("user", f"{i} + {i}?")]
    return [{"role": role, "content": content} for role, content in turns]


VERL = [
    {
        "data_source": "sums", "prompt": talk(i), "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(2 * i)}, "extra_info": {"index": i, "split": "train"},
    }
    for i in range(9)
]  # fmt: skip
TRL = [{"prompt": talk(i), "solution": str(2 * i)} for i in range(9)]
VERL_COLUMNS = {"question": "prompt", "answer": "reward_model.ground_truth", "id": "extra_info.index"}
TRL_COLUMNS = {"question": "prompt", "answer": "solution"}
FORMS: dict[str, dict[str, Any]] = {
    "verl parquet": {"type": "parquet", "path": "verl.parquet", "columns": VERL_COLUMNS},
    "TRL conversational": {"type": "jsonl", "path": "trl.jsonl", "columns": TRL_COLUMNS},
    "save_to_disk": {"type": "hf", "path": "saved", "columns": TRL_COLUMNS},
    "streamed lines": {"type": "jsonl", "path": "trl.jsonl", "columns": TRL_COLUMNS, "streaming": True},
    "stream": {"type": "hf", "path": "trl.jsonl", "columns": TRL_COLUMNS, "streaming": True, "shuffle_window": 5},
    "mix": {
        "type": "mix",
        "sources": [
            {"name": "verl", "weight": 2, "data": {"type": "parquet", "path": "verl.parquet", "columns": VERL_COLUMNS}},
            {"name": "trl", "data": {"type": "jsonl", "path": "trl.jsonl", "columns": TRL_COLUMNS, "streaming": True}},
        ],
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets = pytest.importorskip("datasets")
    place = tmp_path_factory.mktemp("forms")
    save_model(place / "model", "qwen2")
    datasets.Dataset.from_list(VERL).to_parquet(str(place / "verl.parquet"))
    datasets.Dataset.from_list(TRL).save_to_disk(str(place / "saved"))
    write_jsonl(place / "trl.jsonl", TRL)
    (place / "mine.py").write_text(REWARD)
    (place / "recipe.toml").write_text(RECIPE)
    return place


def call(*arguments: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        assert cli.main(["train", *arguments]) == 0, out.getvalue()
    return out.getvalue()


def toml(value: Any) -> str:
    """A value as an inline table."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + "}"
    return f"[{', '.join(map(toml, value))}]" if isinstance(value, list) else json.dumps(value)


def outcome(run: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], list[str]]:
    """Figures without times, weights, and the ids of the prompts."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in lines]
    ids = [tree.prompt.id for step in (1, 2, 3) for tree in load_trees(run / "trees" / f"step-{step:06}.jsonl.gz")]
    return figures, load_file(run / "checkpoints" / "step-000003" / "model" / "model.safetensors"), ids


@pytest.mark.parametrize("form", FORMS)
def test_a_public_form_is_trained_and_resumed(place: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
    name = form.replace(" ", "-")
    call("recipe.toml", "--run.name", name, "--data", toml(FORMS[form]))
    run = place / "runs" / name
    figures, weights, ids = outcome(run)
    assert max(line["main/mixed"] for line in figures) > 0 and figures[-1]["ledger/optimizer_steps"] > 0
    assert any(line["pivots/count"] for line in figures)
    assert len(set(ids)) == 9 if form != "mix" else {"verl", "trl"} == {each.partition("/")[0] for each in ids}
    tree = next(load_trees(run / "trees" / "step-000001.jsonl.gz"))
    assert tree.prompt.question == tree.prompt.messages[-1]["content"] and tree.prompt.question in tree.prompt.text
    call("--resume", str(run), "--step", "2")
    again, same, once_more = outcome(run)
    assert again == figures and once_more == ids
    assert all(torch.equal(same[key], weights[key]) for key in weights)
    if form == "mix":
        assert figures[-1]["source/verl/epochs"] == 6 / 9 and figures[-1]["source/trl/skipped"] == 0
        assert {"source/verl/reward", "source/trl/mixed", "source/trl/prompts"} <= set(figures[0])
    if form.startswith("stream"):
        changed = [{**row, "solution": "0"} if i == 8 else row for i, row in enumerate(TRL)]
        write_jsonl(place / "trl.jsonl", changed)
        try:
            with pytest.raises(AssertionError, match=r"data: the prompts of 'trl.jsonl' have changed since the checkpoint"):
                call("--resume", str(run), "--run.steps", "4")
        finally:
            write_jsonl(place / "trl.jsonl", TRL)
